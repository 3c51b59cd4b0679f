"""metrics.csv in the run folder, of which its summary and report are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_rlhf.errors import UserError
from lit_rlhf.loggers.numbering import STEP, numbered
from lit_rlhf.metrics import AXES
from lit_rlhf.run_folder import METRICS, format_rows, read_rows, replace_file, writing


class CSVLogger(Logger):
    """Writes `<save_dir>/metrics.csv`: a header, then one row per iteration, on disk as soon as it is logged.

    Columns are `iteration, episode, tokens`, then metrics in the order they first appeared; a metric that a row
    lacks is blank. Floats are written with `repr`, so they read back to the bit.

    Args:
        save_dir: the run folder; made when missing.
    """

    # With both empty, a ModelCheckpoint without dirpath writes to <save_dir>/checkpoints.
    name = ""
    version = ""

    def __init__(self, *, save_dir: str | Path) -> None:
        super().__init__()
        self._path = Path(save_dir) / METRICS
        self._columns: list[str] | None = None  # those of the file; None: not looked at yet
        self._iteration: int | None = None  # of the algorithm's newest row; None: no algorithm has begun

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: config.yaml holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends one row. `step` is the iteration, unless the row names it itself; see also `numbered`.

        Raises:
            UserError: neither names the iteration, or the file cannot be written.
        """
        named = numbered(metrics, step, self._iteration)
        row = {name: _text(value) for name, value in named.items() if value is not None}
        if "iteration" not in row:
            raise UserError("A row of metrics.csv needs its iteration: log_metrics(row, step=iteration).")
        if self._columns is None:
            self._cut(None)
        if self._iteration is not None:
            self._iteration = int(row["iteration"])
        columns = self._columns or list(AXES)
        new = [name for name in row if name not in columns]
        if new or not self._columns:
            self._write([*columns, *new], [*read_rows(self._path)[1], row])
        else:
            with writing(self._path), open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(format_rows(columns, [row], header=False))

    @rank_zero_only
    def resume_from(self, iteration: int, step: int = 0) -> None:
        """Keeps the rows up to and including `iteration` and cuts the later ones; -1 cuts all.

        Of rows with a `step`, see `numbered`, those before `step` are kept.
        """
        self._iteration = max(iteration, 0)
        self._cut(iteration, step)

    def _cut(self, last: int | None, step: int = 0) -> None:
        columns, rows = read_rows(self._path)
        kept = [
            row
            for row in rows
            if last is None or (int(row[STEP]) < step if STEP in row else int(row["iteration"]) <= last)
        ]
        if kept:
            self._write(columns, kept)  # without the line that a kill may have cut short
        else:
            self._path.unlink(missing_ok=True)
            self._columns = []

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, format_rows(columns, rows, header=True))
        self._columns = columns


def _text(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return repr(int(number) if isinstance(number, int) else float(number))
