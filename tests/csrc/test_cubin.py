"""hylo_ops.cubin: where device code comes from, the cache, and its keys. Compiles for sm_90a; needs no GPU."""

import shutil
import threading

import pytest

from hylo_ops import cubin
from hylo_ops.cubin import Spec

SMALL = Spec("gated_rms_norm", (("V", 24), ("VEC", 8), ("T", "bf16"), ("W", "bf16")))  # on nobody's list
LISTED = Spec("gated_rms_norm", (("V", 64), ("VEC", 8), ("T", "bf16"), ("W", "bf16")))
ELF = b"\x7fELF"

nvrtc = pytest.mark.skipif(cubin.why_not_nvrtc() is not None, reason=f"cannot compile here: {cubin.why_not_nvrtc()}")


@pytest.fixture
def compiled(monkeypatch):
    """Counts compilations and makes them instant; the real one is tested by name below."""
    calls = []

    def fake(spec):
        calls.append(spec)
        return ELF + spec.file_name("fake").encode()

    monkeypatch.setattr(cubin, "compile_nvrtc", fake)
    return calls


@nvrtc
def test_compiles_and_reads_back_the_same_bytes(tmp_path, monkeypatch):
    first = cubin.device_code(SMALL, cache_dir=tmp_path)
    assert first.startswith(ELF)
    monkeypatch.setattr(cubin, "compile_nvrtc", lambda spec: pytest.fail("compiled again"))
    assert cubin.device_code(SMALL, cache_dir=tmp_path) == first


@nvrtc
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-5], lambda b: b"\0" + b[1:]])
def test_a_damaged_entry_is_compiled_anew(tmp_path, compiled, damage):
    good = cubin.device_code(SMALL, cache_dir=tmp_path)
    (entry,) = tmp_path.iterdir()
    stored = entry.read_bytes()
    entry.write_bytes(damage(stored))
    assert cubin.device_code(SMALL, cache_dir=tmp_path) == good
    assert len(compiled) == 2
    assert entry.read_bytes() == stored


@nvrtc
def test_the_key_holds_dims_and_nvrtc_version(tmp_path, compiled, monkeypatch):
    other = Spec("gated_rms_norm", (("V", 32), *SMALL.defines[1:]))
    cubin.device_code(SMALL, cache_dir=tmp_path)
    cubin.device_code(other, cache_dir=tmp_path)
    program, options, version = cubin._nvrtc()
    monkeypatch.setattr(cubin, "_nvrtc", lambda: (program, options, f"{version}.1"))
    cubin.device_code(SMALL, cache_dir=tmp_path)
    assert compiled == [SMALL, other, SMALL]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("header", ["common/reduce.cuh", "gated_rms_norm/params.h", "gated_rms_norm/kernel.cuh"])
def test_the_key_changes_with_every_source(tmp_path, header):
    root = shutil.copytree(cubin.source_dir(), tmp_path / "csrc")
    before = cubin.source_hash("gated_rms_norm", root)
    assert before == cubin.source_hash("gated_rms_norm")
    (root / header).write_text((root / header).read_text() + "\n")
    assert cubin.source_hash("gated_rms_norm", root) != before


def test_the_key_ignores_other_stems_and_host_code(tmp_path):
    root = shutil.copytree(cubin.source_dir(), tmp_path / "csrc")
    before = cubin.source_hash("gated_rms_norm", root)
    (root / "ssd").mkdir(exist_ok=True)
    (root / "ssd" / "kernel.cuh").write_text("// another stem\n")
    (root / "common" / "driver.cpp").write_text("// host\n")
    assert cubin.source_hash("gated_rms_norm", root) == before


@nvrtc
def test_writers_at_the_same_time_leave_one_whole_entry(tmp_path, compiled):
    threads = [
        threading.Thread(target=cubin.device_code, args=(SMALL,), kwargs={"cache_dir": tmp_path}) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = tmp_path.iterdir()
    assert entry.suffix == ".cubin"
    count = len(compiled)
    cubin.device_code(SMALL, cache_dir=tmp_path)
    assert len(compiled) == count


@nvrtc
def test_an_unwritable_cache_warns_and_still_gives_code(tmp_path, compiled):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="kernel cache cannot be written"):
        assert cubin.device_code(SMALL, cache_dir=tmp_path / "file" / "below").startswith(ELF)


def test_packaged_is_taken_first_and_on_request(tmp_path, compiled, monkeypatch):
    sources = cubin.source_dir()
    monkeypatch.setattr(cubin, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cubin, "source_dir", lambda: sources)
    path = cubin.packaged_path(LISTED)
    path.parent.mkdir(parents=True)
    path.write_bytes(ELF + b"packaged")
    assert cubin.device_code(LISTED) == ELF + b"packaged"
    assert cubin.device_code(LISTED, source="packaged") == ELF + b"packaged"
    assert compiled == []


@nvrtc
def test_nvrtc_on_request_passes_the_packaged_cubin_by(tmp_path, compiled):
    cubin.device_code(LISTED, source="nvrtc", cache_dir=tmp_path)
    assert compiled == [LISTED]


def test_what_is_not_packaged_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="no cubin is packaged for gated_rms_norm-kernel-V24-"):
        cubin.device_code(SMALL, source="packaged")


def test_without_nvrtc_only_the_packaged_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(cubin, "why_not_nvrtc", lambda: "NVRTC is not installed")
    assert cubin.why_not.__wrapped__(SMALL) == "NVRTC is not installed"
    packaged = tmp_path / "listed.cubin"
    packaged.write_bytes(ELF)
    monkeypatch.setattr(cubin, "packaged_path", lambda spec: packaged)
    assert cubin.why_not.__wrapped__(LISTED) is None


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="got 'ptx'"):
        cubin.device_code(SMALL, source="ptx")


def test_missing_headers_are_named(monkeypatch):
    monkeypatch.setattr(cubin, "_HEADER", "no_such_header.h")
    with pytest.raises(NotImplementedError, match=r"NVRTC needs no_such_header\.h"):
        cubin.cuda_include_dirs()


def test_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubin.default_cache_dir() == tmp_path / "hylo_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cubin.default_cache_dir() == tmp_path / "home" / ".cache" / "hylo_ops"
