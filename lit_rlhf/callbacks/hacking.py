"""A monitor of reward hacking: it watches every iteration's completions, names its evidence, and acts if asked to."""

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_rlhf.callbacks.rollback import Rollback
from lit_rlhf.checks import check_int, check_number
from lit_rlhf.errors import UserError
from lit_rlhf.hacking import Cusum, Detector, Iteration, Reading, default_detectors
from lit_rlhf.run_folder import ALARMS, append_rows, cut_rows_after

log = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "raise_kl", "rollback")
_SHOWN = 160  # characters of a completion in the log


class HackingMonitor(Callback):
    """Watches for signs of reward hacking in each iteration's training completions, by ``detectors``.

    Each alarm goes to the log, to ``<trainer.default_root_dir>/alarms.jsonl`` with its evidence, and to loggers that
    have alerts (W&B). What the detectors measure is logged as ``hacking/<detector>``, their sums of evidence as
    ``hacking/<detector>/evidence``; ``lit_rlhf/hacking/statistics.py`` says what these are.

    Args:
        action: what follows an alarm. ``warn``: nothing more. ``stop``: the run ends after the iteration. ``raise_kl``:
            the KL coefficient is multiplied by ``factor``, from the next iteration on and for good. ``rollback``: the
            run goes back to the beginning of the last iteration in which no detector had any evidence, with the
            learning rate divided by ``factor`` and the KL coefficient, if there is one, multiplied by it.
        baseline: iterations at the start that later ones are compared with, at least 2.
        evidence: the sum of evidence, in standard errors, that raises an alarm, > 0.
        cooldown: iterations after an alarm in which the same detector raises no other one, at least 0.
        factor: of ``raise_kl`` and ``rollback``, above 1.
        max_rollbacks: of a run, at least 1; the next alarm ends it as ``stop`` does.
        completions: how many an alarm shows, at least 1.
        detectors: name -> detector; one that is null is left out. None takes all with their defaults.

    Raises:
        UserError: a value is out of its range; at the start, an offline algorithm, no coefficient to raise, or no
            ``Checkpoints`` to go back to.
        RolledBack: in a run, after a rollback.
    """

    def __init__(
        self,
        *,
        action: str = "warn",
        baseline: int = 5,
        evidence: float = 8.0,
        cooldown: int = 10,
        factor: float = 2.0,
        max_rollbacks: int = 3,
        completions: int = 3,
        detectors: Mapping[str, Detector | None] | None = None,
    ) -> None:
        if action not in ACTIONS:
            raise UserError(f"callbacks.hacking.action must be one of {', '.join(ACTIONS)}, got {action!r}")
        self.action = action
        self.baseline = check_int("callbacks.hacking.baseline", baseline, at_least=2)
        check_number("callbacks.hacking.evidence", evidence, above=0)
        self.cooldown = check_int("callbacks.hacking.cooldown", cooldown, at_least=0)
        self.factor = check_number("callbacks.hacking.factor", factor, above=1)
        self.rollback = Rollback("callbacks.hacking", lr_factor=1 / self.factor, most=max_rollbacks)
        self.completions = check_int("callbacks.hacking.completions", completions, at_least=1)
        self.detectors = _checked(default_detectors() if detectors is None else detectors)
        self.sums = {name: Cusum(evidence) for name in self.detectors}
        self.last_alarm: dict[str, int] = {}  # the iteration of each detector's newest
        self.alarms = 0  # so far in the run
        self.stopping = False
        self.unwritten: list[dict[str, Any]] = []  # alarms of the iteration under way
        self.led_back: list[dict[str, Any]] = []  # those that put the run back: they stay in the file when rows are cut
        self._path: Path | None = None
        self._cut_in_setup: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not pl_module.online:
            raise UserError("callbacks.hacking is for algorithms that complete prompts; this one has no rollouts")
        if self.action == "raise_kl" and not pl_module.kl.at(0.0) + pl_module.kl.at(1.0) > 0:
            raise UserError("callbacks.hacking.action=raise_kl: there is no KL coefficient to raise; choose kl=fixed")
        if self.action == "rollback" and stage == "fit":
            self.rollback.setup(trainer, pl_module)
        self._path = Path(trainer.default_root_dir) / ALARMS
        if self._cut_in_setup is not None:
            self.resume_from(self._cut_in_setup)
            self._cut_in_setup = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run that an alarm has ended trains no further."""
        loader = pl_module.loader
        within = loader is not None and loader.experience is not None and loader.position < len(loader)
        if self.stopping and not within:
            self._stop(trainer, pl_module)

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the algorithm when an iteration begins, before prompts are drawn."""
        if self.action == "rollback":
            self.rollback.begin(trainer, pl_module)

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
        """Called by the algorithm with what was measured about an iteration's completions."""
        number = pl_module.iteration + 1
        rows = [row for row in pl_module.samples if row["split"] == "train"]
        iteration = Iteration(
            number=number, rows=rows, metrics=metrics, gold=_gold(pl_module, rows), baseline=self.baseline
        )
        logged, raised = {}, []
        for name, detector in self.detectors.items():
            reading = detector.measure(iteration)
            if reading is None:
                continue
            alarm = reading.excess is not None and self.sums[name].add(reading.excess)
            logged[name] = reading.value
            logged |= {f"{name}/{extra}": value for extra, value in reading.extra.items()}
            logged[f"{name}/evidence"] = self.sums[name].sum
            if alarm and number - self.last_alarm.get(name, -self.cooldown) >= self.cooldown:
                raised.append(self._raise(name, reading, iteration))
        quiet = not any(cusum.sum for cusum in self.sums.values())
        for alarm in raised:
            self.sums[alarm["detector"]].sum = 0.0  # the next one needs evidence of its own
            self.last_alarm[alarm["detector"]] = number
        self.alarms += len(raised)
        self.unwritten += raised
        if raised:
            self._act(trainer, pl_module, raised)
        if self.action == "rollback" and quiet:
            self.rollback.keep(trainer)
        logged |= {"alarms": float(self.alarms), "rollbacks": float(self.rollback.count)}
        pl_module.pending.update({f"hacking/{name}": float(value) for name, value in logged.items()})

    def _raise(self, name: str, reading: Reading, iteration: Iteration) -> dict[str, Any]:
        worst = torch.as_tensor(reading.suspects).argsort(descending=True, stable=True)[: self.completions].tolist()
        shown = ("prompt", "completion", "score", "components", "gold", "kl", "length")
        alarm = {
            "iteration": iteration.number,
            "detector": name,
            "value": reading.value,
            "evidence": self.sums[name].sum,
            "note": reading.note,
            "action": self.action,
            "completions": [{key: iteration.rows[i][key] for key in shown} for i in worst],
        }
        log.warning("%s", describe_alarm(alarm))
        return alarm

    def _act(self, trainer: Trainer, module: LightningModule, raised: list[dict[str, Any]]) -> None:
        number = raised[0]["iteration"]
        if self.action == "stop":
            self.stopping = True
        elif self.action == "raise_kl":
            module.kl.raise_by(self.factor)
            log.warning("iteration %d: the KL coefficient is multiplied by %g from now on", number, self.factor)
        elif self.action == "rollback":
            self._roll_back(trainer, module, raised)

    def _roll_back(self, trainer: Trainer, module: LightningModule, raised: list[dict[str, Any]]) -> None:
        number = raised[0]["iteration"]
        place = self.rollback.place(trainer)
        if place is None or self.rollback.count == self.rollback.most:
            log.warning("iteration %d: the run cannot be put back once more: it stops after this iteration", number)
            self.stopping = True
            return
        scale = module.kl.scale * self.factor
        self.led_back += raised

        def raise_kl() -> None:
            module.kl.scale = scale

        self.rollback.go_back(trainer, module, f"iteration {number}: reward hacking", raise_kl)

    def on_taken_back(self, trainer: Trainer, pl_module: LightningModule, states: Mapping[str, Any]) -> None:
        """Called when any callback has put the run back, with all callbacks' states there.

        What was seen of the iterations that are done again is forgotten, or it would count twice.
        """
        del trainer
        if self.state_key not in states:
            return  # it was not there yet
        then = states[self.state_key]
        for alarm in self.led_back:
            if alarm.get("logged", math.inf) > pl_module.last_logged:
                alarm.pop("logged", None)  # its line was cut, or not written yet
        now = {
            "alarms": then["alarms"] + len(self.led_back) - len(then["led_back"]),
            "unwritten": [alarm for alarm in self.led_back if "logged" not in alarm],
            "led_back": self.led_back,
            "rollbacks": self.rollback.count,
        }
        self.load_state_dict({**then, **now})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Ends the run with the iteration's last step; before that it would end within the iteration."""
        if self.stopping and pl_module.loader.position >= len(pl_module.loader):
            self._stop(trainer, pl_module)

    @staticmethod
    def _stop(trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop = True
        module.stopped_by = "callbacks.hacking"

    def on_samples(
        self, trainer: Trainer, pl_module: LightningModule, iteration: int, rows: list[dict[str, Any]]
    ) -> None:
        """Called by the algorithm at the end of an iteration: writes its alarms."""
        del pl_module, rows
        alarms, self.unwritten = self.unwritten, []
        for alarm in [*alarms, *self.led_back]:
            alarm.setdefault("logged", iteration)
        if alarms:
            self._write(trainer, alarms)

    @rank_zero_only
    def _write(self, trainer: Trainer, alarms: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self._path, alarms)
        for logger in trainer.loggers:
            if hasattr(logger, "log_alert"):
                for alarm in alarms:
                    title = f"Reward hacking: {alarm['detector']}, iteration {alarm['iteration']}"
                    logger.log_alert(title, describe_alarm(alarm))

    @rank_zero_only
    def resume_from(self, iteration: int, step: int = 0) -> None:  # noqa: ARG002
        """Keeps the alarms that were written up to and including ``iteration``; -1 cuts all, as for the loggers."""
        if self._path is None:
            self._cut_in_setup = iteration
            return
        cut_rows_after(self._path, "logged", iteration)

    def state_dict(self) -> dict[str, Any]:
        from lit_rlhf.algorithms.base import require_plain  # which imports callbacks

        states = {name: detector.state_dict() for name, detector in self.detectors.items()}
        for name, state in states.items():  # a user's may hold anything
            require_plain(f"the state_dict() of callbacks.hacking.detectors.{name}", state)
        return {
            "detectors": states,
            "sums": {name: cusum.sum for name, cusum in self.sums.items()},
            "last_alarm": dict(self.last_alarm),
            "alarms": self.alarms,
            **self.rollback.state_dict(),
            "stopping": self.stopping,
            "unwritten": copy.deepcopy(self.unwritten),
            "led_back": copy.deepcopy(self.led_back),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in set(self.detectors) & set(state_dict["detectors"]):  # the config may have others now
            self.detectors[name].load_state_dict(state_dict["detectors"][name])
            self.sums[name].sum = state_dict["sums"][name]
        self.last_alarm = dict(state_dict["last_alarm"])
        self.alarms = state_dict["alarms"]
        self.rollback.load_state_dict(state_dict)
        self.stopping = state_dict["stopping"]
        self.led_back = copy.deepcopy(state_dict["led_back"])
        self.unwritten = copy.deepcopy(state_dict["unwritten"])


def describe_alarm(alarm: Mapping[str, Any]) -> str:
    """An alarm in one line, with the first of its completions."""
    first = alarm["completions"][0]
    text = first["completion"]
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    note = f" ({alarm['note']})" if alarm["note"] else ""
    return (
        f"iteration {alarm['iteration']}: reward hacking? {alarm['detector']} is {alarm['value']:.4g}{note}; for "
        f"example, with a score of {first['score']:.4g}: {first['prompt'][-80:]!r} -> {text!r}"
    )


def _checked(detectors: Mapping[str, Detector | None]) -> dict[str, Detector]:
    if not isinstance(detectors, Mapping):
        raise UserError(f"callbacks.hacking.detectors must map names to detectors, got {detectors!r}")
    for name, detector in detectors.items():
        if detector is not None and not isinstance(detector, Detector):
            raise UserError(f"callbacks.hacking.detectors.{name} must be a lit_rlhf.hacking.Detector, got {detector!r}")
    return {name: detector for name, detector in detectors.items() if detector is not None}


def _gold(module: LightningModule, rows: list[dict[str, Any]]) -> torch.Tensor | None:
    """(B,): the gold judge's totals, as its weights have them."""
    if module.gold is None or not rows:
        return None
    weights = getattr(module.gold, "weights", None) or {}
    totals = [sum(weights.get(name, 1.0) * value for name, value in row["gold"].items()) for row in rows]
    return torch.tensor(totals, dtype=torch.double)
