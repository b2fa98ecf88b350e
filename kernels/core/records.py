"""Tuning records: what was measured where, as data.

One JSON file per device and op, written atomically, checked when read. A file that is broken,
foreign or of an older kernel is reported once and ignored; it never stops a computation.

Look-up order: overlay -> user cache -> shipped exact -> nearest bucket -> older capability.
Only the key is bucketed; kernels always see the real sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .device import KNOWN, Device
from .errors import TuningRecordWarning
from .problem import Problem, Scalar
from .registry import Op, Spec
from .setting import Setting

SCHEMA = 1
MAX_BUCKET_DISTANCE = 2.0
"""A record counts as near while the sizes differ by at most this many doublings in all."""


@dataclass(frozen=True)
class Timing:
    """Percentiles of one implementation's time, in microseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Record:
    """The measured winner of one key on one device.

    ``config`` is None where the plain path won. ``plain`` is the plain path's time, so a record
    says what its winner buys. ``kernel_hash`` names the kernel source that was timed.
    """

    framework: str
    direction: str
    dtype: str
    dims: tuple[tuple[str, int], ...]
    flags: tuple[tuple[str, Scalar], ...]
    implementation: str
    config: tuple[tuple[str, int | str | bool], ...] | None
    winner: Timing
    plain: Timing
    versions: tuple[tuple[str, str], ...]
    kernel_hash: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a look-up must match, sizes last."""
        flags = tuple(sorted(self.flags))
        return (self.framework, self.direction, self.dtype, flags, self.dims)

    def instantiate(self, spec: Spec) -> Any:
        """``config`` as an instance of the spec's ``Config``."""
        return None if self.config is None else spec.Config(**dict(self.config))


@dataclass(frozen=True)
class Found:
    """A record and where it was found, nearest source first in `candidates`."""

    record: Record
    source: str


def bucket(spec: Spec, problem: Problem) -> Problem:
    """``problem`` at its tuning key's sizes: the spec's rule (which may also drop flags that do
    not matter to speed), or each dim rounded up to a power of two."""
    own = getattr(spec, "bucket", None)
    if own is not None:
        return own(problem)
    return problem.with_dims(
        {name: 1 << max(0, size - 1).bit_length() for name, size in problem.dims}
    )


def key_of(spec: Spec, problem: Problem, framework: str) -> tuple[Any, ...]:
    """The key under which ``problem`` is recorded; see `Record.key`."""
    small = bucket(spec, problem)
    return (framework, problem.direction, problem.dtype, tuple(sorted(small.flags)), small.dims)


def kernel_hash(op: Op, framework: str) -> str:
    """A short hash of the op's kernel source: a record of another source is stale."""
    return _hash(op.package, op.binding(framework).kernel_module)  # type: ignore[arg-type]


@cache
def _hash(package: str, module: str) -> str:
    from importlib.util import find_spec

    found = find_spec(f"{package}.{module}")
    if found is None or found.origin is None:
        return ""
    # With what kernels of several ops share: `core/triton_*.py` or `core/pallas_*.py`.
    shared = Path(__file__).parent.glob(f"{module.partition('_')[0]}_*.py")
    sources = b"".join(path.read_bytes() for path in (Path(found.origin), *sorted(shared)))
    return hashlib.sha256(sources).hexdigest()[:12]


def shipped_folder() -> Path:
    """The records that come with the package."""
    return Path(__file__).resolve().parent.parent / "tuned"


def user_folder() -> Path:
    """The user's own records: ``ML_NETWORKS_CACHE``, or the platform's cache folder."""
    own = os.environ.get("ML_NETWORKS_CACHE")
    if own:
        return Path(own) / "tuned"
    try:
        import platformdirs
    except ImportError:
        return Path.home() / ".cache" / "ml-networks" / "tuned"
    return Path(platformdirs.user_cache_dir("ml-networks")) / "tuned"


def path_of(folder: Path, device_key: str, op: str) -> Path:
    """The file of ``op``'s records for a device."""
    return folder / device_key / f"{op}.json"


def _ignore(path: Path, why: str) -> None:
    warnings.warn(f"tuning file {path} is ignored: {why}", TuningRecordWarning, stacklevel=4)


def _pairs(value: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(value.items())


def _parse(row: dict[str, Any]) -> Record:
    """One JSON row as a `Record`; raises KeyError, TypeError, ValueError or AttributeError."""
    names = {field.name for field in dataclasses.fields(Record)}
    if set(row) != names:
        raise ValueError(f"a record has fields {sorted(set(row) ^ names)} too many or too few")
    winner, plain = (_timing(row[name]) for name in ("winner", "plain"))
    dims = {str(name): int(size) for name, size in row["dims"].items()}
    return Record(
        framework=str(row["framework"]),
        direction=str(row["direction"]),
        dtype=str(row["dtype"]),
        dims=_pairs(dims),
        flags=_pairs(row["flags"]),
        implementation=str(row["implementation"]),
        config=None if row["config"] is None else _pairs(row["config"]),
        winner=winner,
        plain=plain,
        versions=_pairs(row["versions"]),
        kernel_hash=str(row["kernel_hash"]),
        date=str(row["date"]),
    )


def _timing(row: dict[str, Any]) -> Timing:
    timing = Timing(**{name: float(value) for name, value in row.items()})
    if not all(math.isfinite(t) and t > 0 for t in dataclasses.astuple(timing)):
        raise ValueError(f"a time is not a positive number: {timing}")
    return timing


def read(path: Path, device_key: str, op: str) -> list[Record]:
    """The records of ``path``; [] where it does not exist, or, with a `TuningRecordWarning`,
    where it is not a tuning file of this schema, device and op."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        _ignore(path, f"it cannot be read ({error})")
        return []
    try:
        content = json.loads(text)
        stated = (content["schema"], content["device"], content["op"])
        if stated != (SCHEMA, device_key, op):
            _ignore(path, f"it says (schema, device, op) = {stated}")
            return []
        return [_parse(row) for row in content["records"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _ignore(path, f"it is broken ({type(error).__name__}: {error})")
        return []


def write(path: Path, device_key: str, op: str, records: Iterable[Record]) -> bool:
    """Write ``records`` atomically, sorted, one of a key (the last). Returns False, with a
    `TuningRecordWarning`, where the folder cannot be written."""
    latest = {record.key: record for record in records}
    rows = []
    for key in sorted(latest, key=repr):
        row = asdict(latest[key])
        for name in ("dims", "flags", "versions"):
            row[name] = dict(row[name])
        row["config"] = None if row["config"] is None else dict(row["config"])
        rows.append(row)
    content = {"schema": SCHEMA, "device": device_key, "op": op, "records": rows}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            temporary = Path(file.name)
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        warnings.warn(
            f"tuning file {path} cannot be written ({error}); the results are kept for this "
            "process only. Set ML_NETWORKS_CACHE to a folder that can be written.",
            TuningRecordWarning,
            stacklevel=2,
        )
        return False
    finally:
        forget()
    return True


_unwritten: dict[tuple[str, str], list[Record]] = {}


def save(device: Device, op: str, records: Iterable[Record]) -> bool:
    """Add ``records`` to the user's cache for ``device``. Where that cannot be written they hold
    for this process, and False is returned."""
    new = list(records)
    path = path_of(user_folder(), device.key, op)
    written = write(path, device.key, op, [*read(path, device.key, op), *new])
    if not written:
        _unwritten.setdefault((device.key, op), [])[:0] = new
        forget()
    return written


_overlay: Setting[tuple[tuple[str, Record], ...]] = Setting(())


@contextlib.contextmanager
def overlay(op: str, *records: Record) -> Iterator[None]:
    """Prefer ``records`` for ``op`` inside the block, above every file."""
    with _overlay.during((*((op, record) for record in records), *_overlay.value)):
        yield


def overlay_token() -> tuple[tuple[str, Record], ...]:
    """The overlay in force, for use in a cache key."""
    return _overlay.value


@cache
def _read_once(folder: Path, device_key: str, op: str) -> tuple[Record, ...]:
    return tuple(read(path_of(folder, device_key, op), device_key, op))


_listeners: list[Any] = []


def forget() -> None:
    """Drop what was read from files; the next look-up reads them again."""
    _read_once.cache_clear()
    for clear in _listeners:
        clear()


def on_change(clear: Any) -> None:
    """Call ``clear()`` whenever the records may have changed."""
    _listeners.append(clear)


def distance(record: Record, key: tuple[Any, ...]) -> float:
    """Doublings between a record's sizes and a key's; inf where anything else differs."""
    *exact, dims = key
    if list(record.key[:-1]) != exact or [n for n, _ in record.dims] != [n for n, _ in dims]:
        return math.inf
    pairs = zip(record.dims, dims, strict=True)
    return sum(abs(math.log2(max(1, mine) / max(1, its))) for (_, mine), (_, its) in pairs)


def _has_config(record: Record, spec: Spec, plain: str) -> bool:
    if record.config is None:
        fits = record.implementation == plain
    else:
        values = dict(record.config)
        names = {field.name for field in dataclasses.fields(spec.Config)}
        fits = set(values) == names and all(isinstance(v, int | str) for v in values.values())
    if not fits:
        warnings.warn(
            f"a tuning record of {spec.NAME} is ignored: {record.implementation} has no config "
            f"{record.config}",
            TuningRecordWarning,
            stacklevel=4,
        )
    return fits


def candidates(op: Op, problem: Problem, device: Device, framework: str) -> list[Found]:
    """The records that may serve ``problem``, best source first. Stale ones are left out, and,
    with a `TuningRecordWarning`, those whose config is none of the op's.
    """
    spec = op.spec
    plain = op.binding(framework).plain  # type: ignore[arg-type]
    key = key_of(spec, problem, framework)
    fresh = kernel_hash(op, framework)
    found = [
        Found(record, "overlay")
        for name, record in _overlay.value
        if name == op.name and record.key == key
    ]
    user = (
        *_unwritten.get((device.key, op.name), ()),
        *_read_once(user_folder(), device.key, op.name),
    )
    own = _read_once(shipped_folder(), device.key, op.name)
    elders = [
        (elder, _read_once(shipped_folder(), elder.key, op.name))
        for elder in sorted(KNOWN, key=lambda known: known.capability, reverse=True)
        if elder.platform == device.platform
        and elder.key != device.key
        and elder.capability <= device.capability
    ]

    def usable(records: Iterable[Record]) -> list[Record]:
        return [r for r in records if r.kernel_hash == fresh and _has_config(r, spec, plain)]

    found += [Found(r, "user cache") for r in usable(user) if r.key == key]
    found += [Found(r, "shipped record") for r in usable(own) if r.key == key]
    near = sorted((distance(r, key), i, r) for i, r in enumerate(usable((*user, *own))))
    found += [
        Found(record, f"nearest record ({dict(record.dims)})")
        for apart, _, record in near
        if 0 < apart <= MAX_BUCKET_DISTANCE
    ]
    for elder, records in elders:
        found += [Found(r, f"record of {elder.name}") for r in usable(records) if r.key == key]
    return found
