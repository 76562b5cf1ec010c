"""`dsv4 build`: kernels compiled for a GPU that is not here, found again by Triton, kept, repaired,
packed and taken in elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.cli import main
from dsv4_plugin.runtime import kernel_cache, precompile

SMALL = "--chunk 2 --requests 2 --context 1024 --tp 8 --arch gfx950".split()
LOAD = precompile.Load(2, 2, 1024)

REPLAY = """
from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.runtime import precompile
geometry, compiled = load_geometry("pro"), []
def done(kernel):
    if kernel.compiled:
        compiled.append(kernel.name)
load = precompile.Load(2, 2, 1024)
kernels = precompile.compile_share(
    geometry, precompile.share(geometry, 8, 1), "gfx950", load, done=done
)
print(kernels, len(compiled), *compiled)
"""


def build(cache: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: Triton keeps what it compiled in memory too."""
    return subprocess.run(
        [sys.executable, "-m", "dsv4_plugin", "build", "pro", *SMALL, "--out", str(cache), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )


def replayed(cache: Path) -> list[str]:
    """What a fresh process that meets the same kernels says: how many, and how many it compiled."""
    ran = subprocess.run(
        [sys.executable, "-c", REPLAY],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache and the manifest of what was built into it."""
    cache = tmp_path_factory.mktemp("kernels")
    ran = build(cache, "--json")
    assert ran.returncode == 0, ran.stderr
    return cache, json.loads(ran.stdout)


def test_the_manifest_says_what_was_built(built):
    cache, manifest = built
    names = {kernel["name"] for kernel in manifest["kernels"]}
    # one of each part of a step
    assert {"product_kernel", "gate_up_kernel", "mhc_project_kernel", "choose_kernel"} <= names
    kernels, others = precompile.count(
        load_geometry("pro"), precompile.share(load_geometry("pro"), 8, 1), "gfx950", LOAD
    )
    assert (len(manifest["kernels"]), others) == (kernels, [])
    for kernel in manifest["kernels"]:
        assert kernel["vgpr_count"] > 0 and kernel["vgpr_spill_count"] == 0, kernel["name"]
        assert any(name.endswith(".hsaco") for name in kernel["files"])
    assert json.loads((cache / "dsv4-pro-gfx950-tp8-ep1.json").read_text()) == manifest


def test_a_server_finds_what_was_built_for_it(built, monkeypatch):
    cache, manifest = built
    monkeypatch.setattr(kernel_cache, "root", lambda: cache)
    assert kernel_cache.built_ahead("pro", "gfx950", 8, 1) == len(manifest["kernels"])
    assert kernel_cache.built_ahead("pro", "gfx950", 4, 1) == 0
    monkeypatch.setattr(kernel_cache, "sources", lambda: "another source")
    assert kernel_cache.built_ahead("pro", "gfx950", 8, 1) == 0


def test_another_process_compiles_nothing(built):
    cache, manifest = built
    assert replayed(cache) == [str(len(manifest["kernels"])), "0"]


def test_a_life_drawn_at_random_meets_no_other_kernel(monkeypatch):
    """400 steps of a server: ragged prefills of any length, alone or mixed, and any number of
    requests that decode."""
    draw, load = random.Random(5), precompile.Load()
    geometry = load_geometry("pro")
    layout = precompile.share(geometry, 8, 1)
    known = precompile.count(geometry, layout, "gfx950", load)

    def life(load):
        yield from planned(load)
        for _ in range(200):
            requests = draw.randint(1, load.requests)
            yield requests, requests, load.context
            rows = draw.choice((draw.randint(2, 300), draw.randint(2, load.chunk)))
            requests = draw.randint(1, min(rows - 1, load.requests))
            context = min(load.context, rows + draw.choice((0, 1000, 10**5, load.context)))
            yield rows, requests, context

    planned = precompile.steps
    monkeypatch.setattr(precompile, "steps", life)
    assert precompile.count(geometry, layout, "gfx950", load) == known


def test_tensors_meet_what_their_shapes_alone_met(monkeypatch):
    """A life of an engine whose tensors hold numbers, on a GPU that is not there."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
    import life

    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    geometry, load = load_geometry("flash"), precompile.Load(2048, 64, 1 << 16)
    planned, met = set(), set()

    def plan(number, kernel, *args, grid, **kwargs):
        planned.add((kernel.__name__, precompile.variant_key(kernel, args, kwargs)))

    def launch(kernel, *args, grid, warmup, **kwargs):
        met.add((kernel.__name__, precompile.variant_key(kernel, args, kwargs)))

    precompile._each_variant(geometry, precompile.share(geometry, 8, 1), "sm_90", load, plan)
    with torch.inference_mode(), precompile._believing_in("sm_90", launch):
        life.live(life.rank("flash", "cpu"), load)
    assert met - planned == set() and len(met) > len(planned) / 2


def test_nothing_is_done_twice_and_damage_is_repaired(built):
    cache, manifest = built
    assert " 0 of them compiled now" in build(cache).stdout
    kernel = manifest["kernels"][0]
    binary = next(name for name in kernel["files"] if name.endswith(".hsaco"))
    path = cache / kernel["folder"] / binary
    os.truncate(path, path.stat().st_size // 2)
    said = build(cache).stdout
    assert " 1 of them compiled now" in said and "1 were damaged" in said
    assert replayed(cache)[1] == "0"


@pytest.mark.thorough
def test_a_build_that_was_killed_goes_on(built, tmp_path):
    """From a cache that lacks a dozen kernels, and whose manifest was never written."""
    cache, manifest = built
    partial = tmp_path / "kernels"
    missing = {kernel["folder"] for kernel in manifest["kernels"][::8]}
    shutil.copytree(cache, partial, ignore=shutil.ignore_patterns(*missing))
    for path in partial.glob("*/__grp__*"):
        path.write_text(path.read_text().replace(str(cache), str(partial)))
    (partial / "dsv4-pro-gfx950-tp8-ep1.json").unlink()
    command = [sys.executable, "-m", "dsv4_plugin", "build", "pro", *SMALL, "--out", str(partial)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)

    def again() -> int:
        return sum(bool(list((partial / folder).glob("__grp__*"))) for folder in missing)

    end = time.monotonic() + 300
    while again() < 3 and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= again() < len(missing) and not list(partial.glob("dsv4-*.json"))
    ran = build(partial, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["kernels"] and again() == len(missing)
    assert replayed(partial)[1] == "0"


def test_an_archive_is_taken_in_elsewhere(built, tmp_path):
    cache, manifest = built
    archive, elsewhere = tmp_path / "kernels.tar.gz", tmp_path / "elsewhere"
    assert main(["build", "pro", *SMALL, "--out", str(cache), "--pack", str(archive)]) == 0
    assert main(["build", "--unpack", str(archive), "--out", str(elsewhere)]) == 0
    assert replayed(elsewhere) == [str(len(manifest["kernels"])), "0"]
    # nothing there points back
    assert str(cache) not in "".join(p.read_text() for p in elsewhere.glob("*/__grp__*"))


@pytest.mark.thorough
def test_other_languages_are_built_packed_and_found(built, tmp_path):
    """Each in a process of its own; what was built is found there again, by another process, from
    an archive, and after a file was cut off."""
    from dsv4_plugin import device

    for package in ("flydsl", "tilelang"):
        if device.package_version(package) is None:
            pytest.skip(f"{package} is not installed")
    if not any(map(shutil.which, ("hipcc", "clang++-22", "amdclang++"))):
        pytest.skip("there is no compiler of HIP: apt-get install clang-22 lld-22")
    flags = {"DSV4_MOE": "flydsl", "DSV4_MHC_POST": "tilelang"}
    cache, archive, elsewhere = (tmp_path / name for name in ("kernels", "a.tar.gz", "elsewhere"))
    shutil.copytree(built[0], cache)
    for path in cache.glob("*/__grp__*"):
        path.write_text(path.read_text().replace(str(built[0]), str(cache)))
    name = "dsv4-pro-gfx950-tp8-ep1.json"
    assert "kernels, " in build(cache, "--pack", str(archive), **flags).stdout
    kernels = json.loads((cache / name).read_text())["kernels"]
    others = [kernel for kernel in kernels if kernel["language"] != "triton"]
    assert sorted((each["language"], each["name"]) for each in others) == [
        ("flydsl", "expert_product"),  # gate and up
        ("flydsl", "expert_product"),  # down
        ("tilelang", "mhc_post_kernel"),
    ]
    assert all(each["vgpr_count"] > 0 and each["vgpr_spill_count"] == 0 for each in others)
    assert main(["build", "--unpack", str(archive), "--out", str(elsewhere)]) == 0
    (elsewhere / name).unlink()  # so that every kernel is looked for
    assert " 0 of them compiled now" in build(elsewhere, **flags).stdout
    for other in others:
        (file, *_) = (each for each in other["files"] if each.endswith((".pkl", ".so")))
        path = cache / other["folder"] / file
        os.truncate(path, path.stat().st_size // 2)
    said = build(cache, **flags).stdout
    assert " 3 of them compiled now" in said and "3 were damaged" in said


AITER = """
import os
from pathlib import Path
def get_args_of_build(ops_name, exclude=None):
    known = {"module_mhc", "module_quant"}
    sources = [f"csrc/{ops_name}.cu"] if ops_name in known else []
    return {"srcs": sources, "md_name": "", "verbose": False, "hip_clang_path": None}
def build_module(md_name, srcs, verbose):
    text = f"{os.environ['GPU_ARCHS']} {srcs}"
    (Path(os.environ["AITER_JIT_DIR"]) / f"{md_name}.so").write_text(text)
"""
"""The part of aiter's jit/core.py that builds its modules, which needs ROCm: names and meaning of
arguments as there, at commit 02434470."""


@pytest.fixture
def aiter(tmp_path, monkeypatch):
    """Puts a package with that part, and nothing else, where every process finds it."""
    place = tmp_path / "site"
    (place / "aiter" / "jit").mkdir(parents=True)
    for name in ("__init__.py", "jit/__init__.py"):
        (place / "aiter" / name).touch()
    (place / "aiter" / "jit" / "core.py").write_text(AITER)
    facts = place / "amd_aiter-0.1.14.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text("Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.14\n")
    monkeypatch.setenv("PYTHONPATH", str(place))


def test_aiter_builds_its_modules_where_a_flag_names_it(built, tmp_path, aiter):
    cache = tmp_path / "kernels"
    shutil.copytree(built[0], cache)
    ran = build(cache, "--json", DSV4_MHC_PRE="aiter")
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads(ran.stdout)
    modules = [each for each in manifest["kernels"] if each["language"] == "aiter"]
    assert [each["name"] for each in modules] == ["module_mhc", "module_quant"]
    assert manifest["versions"]["aiter"] == "0.1.14"
    assert (cache / "aiter" / "module_mhc.so").read_text() == "gfx950 ['csrc/module_mhc.cu']"
    ran = build(cache, DSV4_SAMPLE_GREEDY="aiter")
    assert ran.returncode == 2
    assert "module_sample does not compile for gfx950: aiter 0.1.14 has no such" in ran.stderr


def changed(archive: Path, name: str, content: bytes) -> None:
    """The same archive with another content of one file."""
    copy = archive.with_suffix(".changed")
    with tarfile.open(archive) as old, tarfile.open(copy, "w:gz") as new:
        for member in old.getmembers():
            data = content if member.name == name else old.extractfile(member).read()
            kernel_cache._add(new, member.name, data)
    os.replace(copy, archive)


@pytest.mark.parametrize("fault", ["other versions", "other bytes", "cut off", "a path outside"])
def test_an_archive_that_is_not_what_it_says(built, tmp_path, capsys, fault):
    cache, manifest = built
    archive, elsewhere = tmp_path / "kernels.tar.gz", tmp_path / "elsewhere"
    main(["build", "pro", *SMALL, "--out", str(cache), "--pack", str(archive)])
    name = "dsv4-pro-gfx950-tp8-ep1.json"
    if fault == "other versions":
        other = manifest | {"versions": manifest["versions"] | {"triton": "2.0.0"}}
        changed(archive, name, json.dumps(other).encode())
        said = "triton 2.0.0, here "
    elif fault == "other bytes":
        kernel = manifest["kernels"][0]
        file = next(each for each in kernel["files"] if each.endswith(".hsaco"))
        changed(archive, f"{kernel['folder']}/{file}", b"no code")
        said = f"is damaged: {kernel['name']}"
    elif fault == "cut off":
        os.truncate(archive, archive.stat().st_size // 2)
        said = "is cut off"
    else:
        with tarfile.open(archive, "w:gz") as tar:
            kernel_cache._add(tar, "../outside", b"x")
        said = "is no archive of a build"
    capsys.readouterr()
    assert main(["build", "--unpack", str(archive), "--out", str(elsewhere)]) == 2
    assert said in capsys.readouterr().err
    assert not list(elsewhere.glob("*")) or not list(elsewhere.glob("*/*"))
    assert not (tmp_path / "outside").exists()


def test_two_builds_take_turns_or_name_the_other(tmp_path):
    with kernel_cache.locked(tmp_path):
        with pytest.raises(kernel_cache.BuildError, match=f"process {os.getpid()} on .* for more"):
            with kernel_cache.locked(tmp_path, 0.2):
                pass
    with kernel_cache.locked(tmp_path, 0.2):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pro", "--arch", "sm_80"], "not for sm_80"),
        (["--arch", "gfx950"], "which model"),
        (["pro", "--arch", "gfx950", "--tp", "7"], "7 does not divide"),
        (["nosuch", "--arch", "gfx950"], "nosuch"),
    ],
)
def test_wrong_input(tmp_path, capsys, words, said):
    assert main(["build", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_a_draft_has_kernels_of_its_own():
    """The draft's passes, and steps that verify it."""
    geometry = load_geometry("flash-0731")
    share = precompile.share(geometry, 8, 1)
    plain, drafting = (
        precompile.count(geometry, share, "gfx950", precompile.Load(2, 2, 1024, draft))[0]
        for draft in (False, True)
    )
    assert drafting > plain


def test_a_draft_that_is_not_there_is_refused(capsys):
    assert main(["build", "pro", *SMALL, "--draft"]) == 2
    assert "pro has none; leave it out" in capsys.readouterr().err
