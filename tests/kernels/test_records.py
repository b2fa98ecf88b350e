"""Tuning records on disk: what is written comes back, and nothing in a file can stop a program."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ml_networks.kernels.core import device, dispatch, records, registry
from ml_networks.kernels.core.errors import TuningRecordWarning
from ml_networks.kernels.core.problem import Problem
from ml_networks.kernels.core.records import Record, Timing

pytest.importorskip("torch", reason="torch is not installed")

TOY = registry.get("toy_square")
H100 = device.target("sm_90")
PROBLEM = Problem("toy_square", (("elements", 4000),), "float32", (("scale", 1.0),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(records, "_unwritten", {})
    records.forget()
    return tmp_path


def a_record(**more: Any) -> Record:
    record = Record(
        framework="torch",
        direction="forward",
        dtype="float32",
        dims=(("elements", 4096),),
        flags=(("scale", 1.0),),
        implementation="triton",
        config=(("block", 256), ("num_warps", 8)),
        winner=Timing(9.0, 10.0, 11.0),
        plain=Timing(19.0, 20.0, 21.0),
        versions=(("torch", "2.13.0"),),
        kernel_hash=records.kernel_hash(TOY, "torch"),
        date="2026-11-22",
    )
    return replace(record, **more)


def file_of(cache: Path) -> Path:
    return records.path_of(cache / "tuned", H100.key, TOY.name)


def config_chosen() -> tuple[str, Any]:
    decision = dispatch.decide(PROBLEM, H100, TOY.binding("torch"))
    return decision.source, decision.config


def test_what_is_written_comes_back(cache: Path) -> None:
    rows = [
        a_record(),
        a_record(dims=(("elements", 8192),), implementation="torch", config=None),
        a_record(flags=(("b", True), ("a", None), ("c", "x"), ("scale", 0.5))),
    ]
    assert records.save(H100, TOY.name, rows)
    assert sorted(records.read(file_of(cache), H100.key, TOY.name), key=repr) == sorted(
        rows, key=repr
    )
    assert config_chosen() == ("user cache", TOY.spec.Config(256, 8))


def test_the_last_record_of_a_key_stays(cache: Path) -> None:
    records.save(H100, TOY.name, [a_record()])
    newer = a_record(config=(("block", 64), ("num_warps", 2)), date="2026-11-23")
    records.save(H100, TOY.name, [newer])
    assert records.read(file_of(cache), H100.key, TOY.name) == [newer]


def test_flags_match_in_any_order() -> None:
    flags = (("scale", 1.0), ("mode", "a"))
    records.save(H100, TOY.name, [a_record(flags=flags)])
    problem = replace(PROBLEM, flags=flags[::-1])
    assert dispatch.decide(problem, H100, TOY.binding("torch")).source == "user cache"


def test_a_spec_may_leave_flags_out_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TOY.spec
    monkeypatch.setattr(spec, "bucket", lambda p: replace(p, flags=()), raising=False)
    key = records.key_of(spec, PROBLEM, "torch")
    assert key == records.key_of(spec, replace(PROBLEM, flags=(("scale", 7.0),)), "torch")


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    row = json.loads(json.dumps(asdict(a_record())))
    for name in ("dims", "flags", "versions", "config"):
        row[name] = dict(row[name])
    content = {"schema": records.SCHEMA, "device": H100.key, "op": TOY.name, "records": [row]}
    change(content)
    return json.dumps(content)


def set_in_row(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["records"][0].__setitem__(name, value)


BROKEN = {
    "empty": "",
    "not json": "{",
    "a list": "[]",
    "a number": "1",
    "another schema": edited(lambda c: c.update(schema=records.SCHEMA + 1)),
    "another device": edited(lambda c: c.update(device="nvidia-a100")),
    "another op": edited(lambda c: c.update(op="attention")),
    "no records": edited(lambda c: c.pop("records")),
    "records of text": edited(lambda c: c.update(records=["x"])),
    "a field too many": edited(set_in_row("more", 1)),
    "a field too few": edited(lambda c: c["records"][0].pop("date")),
    "a size of text": edited(set_in_row("dims", {"elements": "many"})),
    "dims of a list": edited(set_in_row("dims", [1])),
    "a time of zero": edited(set_in_row("winner", {"p20": 0.0, "p50": 1.0, "p80": 1.0})),
    "a time of nan": edited(set_in_row("plain", {"p20": float("nan"), "p50": 1, "p80": 1})),
    "a time too few": edited(set_in_row("plain", {"p20": 1.0})),
    "truncated": edited(lambda c: None)[:-20],
}


def test_the_unbroken_file_is_read(cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_text(edited(lambda c: None))
    assert config_chosen()[0] == "user cache"


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_or_foreign_file_is_reported_and_ignored(text: str, cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_text(text)
    with pytest.warns(TuningRecordWarning, match=r"toy_square.json is ignored"):
        assert config_chosen()[0] == "heuristic"


def test_a_binary_file_and_a_folder_in_its_place_are_ignored(cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(TuningRecordWarning, match="cannot be read"):
        assert config_chosen()[0] == "heuristic"
    file_of(cache).unlink()
    file_of(cache).mkdir()
    records.forget()
    with pytest.warns(TuningRecordWarning, match="cannot be read"):
        assert config_chosen()[0] == "heuristic"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {"blokc": 256, "num_warps": 8}),
        ("config", {"block": 256}),
        ("config", {"block": [256], "num_warps": 8}),
        ("config", None),
    ],
)
def test_a_config_that_is_none_of_the_ops_is_ignored(name: str, value: Any, cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_text(edited(set_in_row(name, value)))
    with pytest.warns(TuningRecordWarning, match="has no config"):
        assert config_chosen() == ("heuristic", TOY.spec.Config())


def test_an_implementation_that_does_not_exist_is_passed_over(cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_text(edited(set_in_row("implementation", "cutlass")))
    assert config_chosen()[0] == "heuristic"


def test_a_broken_file_is_replaced_by_the_next_save(cache: Path) -> None:
    file_of(cache).parent.mkdir(parents=True)
    file_of(cache).write_text("{")
    with pytest.warns(TuningRecordWarning, match="broken"):
        assert records.save(H100, TOY.name, [a_record()])
    assert config_chosen()[0] == "user cache"


def test_an_unwritable_cache_keeps_results_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ML_NETWORKS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(TuningRecordWarning, match="cannot be written"):
        assert not records.save(H100, TOY.name, [a_record()])
    assert config_chosen() == ("user cache", TOY.spec.Config(256, 8))
    newer = a_record(config=(("block", 64), ("num_warps", 2)))
    with pytest.warns(TuningRecordWarning, match="cannot be written"):
        records.save(H100, TOY.name, [newer])
    assert config_chosen() == ("user cache", TOY.spec.Config(64, 2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_cache_keeps_results_for_the_process(cache: Path) -> None:
    cache.chmod(0o500)
    try:
        with pytest.warns(TuningRecordWarning, match="cannot be written"):
            assert not records.save(H100, TOY.name, [a_record()])
    finally:
        cache.chmod(0o700)
    assert config_chosen()[0] == "user cache"


def test_a_write_that_fails_half_way_leaves_the_old_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.save(H100, TOY.name, [a_record()])
    before = file_of(cache).read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(TuningRecordWarning, match="no space"):
        assert not records.save(H100, TOY.name, [a_record(date="2027-01-01")])
    assert file_of(cache).read_bytes() == before
    assert [path.name for path in file_of(cache).parent.iterdir()] == ["toy_square.json"]


def test_shipped_records_are_sound() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningRecordWarning)
        for path in records.shipped_folder().glob("*/*.json"):
            rows = records.read(path, path.parent.name, path.stem)
            op = registry.get(path.stem)
            for row in rows:
                assert row.instantiate(op.spec) is not None or row.config is None


def test_sizes_too_far_apart_do_not_help() -> None:
    records.save(H100, TOY.name, [a_record(dims=(("elements", 4096 * 4),))])
    assert config_chosen()[0].startswith("nearest")
    records.save(H100, TOY.name, [a_record(dims=(("elements", 4096 * 4),), date="x")])
    problem = PROBLEM.with_dims({"elements": 2000})
    assert dispatch.decide(problem, H100, TOY.binding("torch")).source == "heuristic"


def test_the_cache_folder_without_platformdirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.delenv("ML_NETWORKS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert records.user_folder() == tmp_path / ".cache" / "ml-networks" / "tuned"
