"""Source patches: they fit the installed SGLang, go on and off byte for byte, are refused on drift,
and mend what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_plugin import installation
from dsv4_plugin.cli import main
from dsv4_plugin.host import patches
from dsv4_plugin.host.patches import APPLIED, DRIFTED, NOT_APPLIED, PatchError

PATCHES = {patch.name: patch for patch in patches.patches()}
ROOT = Path(__file__).parents[2]


def released(host, directory):
    """A copy of the files that patches change, as released: what somebody applied to `host` is
    reverted."""
    for patch in PATCHES.values():
        for path in patch.files:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(host / path, directory / path)
        patches.write(directory, patch.apply(directory, revert=True))
    return directory


@pytest.fixture
def wheel(tmp_path):
    return released(patches.host_root(), tmp_path / "wheel")


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*.py"))}


@pytest.mark.parametrize("name", PATCHES)
def test_on_and_off_byte_for_byte_and_twice_is_once(wheel, name, capsys):
    before = contents(wheel)
    assert PATCHES[name].state(wheel) == NOT_APPLIED
    assert main(["patch", "apply", name, "--root", str(wheel)]) == 0
    assert contents(wheel) == before and "nothing was written" in capsys.readouterr().out
    for _ in range(2):
        assert main(["patch", "apply", name, "--root", str(wheel), "--write"]) == 0
    assert PATCHES[name].state(wheel) == APPLIED
    changed = {path for path, content in contents(wheel).items() if content != before[path]}
    assert changed == {wheel / path for path in PATCHES[name].files}
    assert main(["patch", "check", "--root", str(wheel)]) == 0
    assert f"{name}: applied, can be reverted" in capsys.readouterr().out
    for _ in range(2):
        assert main(["patch", "revert", name, "--root", str(wheel), "--write"]) == 0
    assert contents(wheel) == before
    assert not [path for path in wheel.rglob("tmp*")]


def test_all_fit_together(wheel, tmp_path):
    before = contents(wheel)
    main(["patch", "apply", "--root", str(wheel), "--write"])
    again = released(wheel, tmp_path / "of a host that a user patched")
    assert list(contents(again).values()) == list(before.values())
    assert {patch.state(wheel) for patch in PATCHES.values()} == {APPLIED}
    main(["patch", "revert", "--root", str(wheel), "--write"])
    assert contents(wheel) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_drift_is_refused_before_anything_is_written(wheel, action, capsys):
    path = wheel / "srt/speculative/draft_utils.py"
    path.write_text(path.read_text() + "\n# a local change\n")
    before = contents(wheel)
    assert PATCHES["draft-backends-from-registry"].state(wheel) == DRIFTED
    assert main(["patch", action, "--root", str(wheel), "--write"]) == 2
    assert (
        "srt/speculative/draft_utils.py is neither as released nor as patched"
        in capsys.readouterr().err
    )
    assert contents(wheel) == before
    assert main(["patch", "check", "--root", str(wheel)]) == 1


def test_half_a_patch_is_refused(wheel):
    patch = PATCHES["pool-platform-seam"]
    path, content = next(iter(patch.apply(wheel).items()))
    (wheel / path).write_bytes(content)
    with pytest.raises(PatchError, match="only some of its files are patched"):
        patch.apply(wheel)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lost = one_z == 1.0",
            "lost = one_z == 2.0",
            "does not give the content that its record names",
        ),
        (
            "     ).to(tl.float32)",
            "     ).to(tl.float16)",
            "is damaged .*patch does not apply",
        ),
        ("@@ -43", "## -43", "is damaged"),
        ("sglang/kernels/ops/moe/triton", "sglang/another", "is damaged"),
    ],
)
def test_a_damaged_patch_is_refused(wheel, tmp_path_factory, old, new, message):
    damaged = tmp_path_factory.mktemp("patches")
    for path in installation.directory("patches").glob("hash-router*"):
        shutil.copy(path, damaged)
    path = damaged / "hash-router-underflow.patch"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(PatchError, match=message):
        patches.patches(damaged)[0].apply(wheel)


def test_a_damaged_record_is_refused(tmp_path):
    for path in installation.directory("patches").glob("hash-router*"):
        shutil.copy(path, tmp_path)
    record = tmp_path / "hash-router-underflow.yaml"
    record.write_text(record.read_text().replace("title:", "titel:"))
    with pytest.raises(PatchError, match=f"{record} is damaged.*reinstall"):
        patches.patches(tmp_path)


def test_wrong_names_and_places_are_one_line(tmp_path, capsys):
    assert main(["patch", "apply", "pool"]) == 2
    assert main(["patch", "check", "--root", str(tmp_path)]) == 2
    assert main(["patch", "list", "--write"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == 3
        and "no patch 'pool'; there are" in errors[0]
        and "not the directory of an sglang" in errors[1]
    )


@pytest.mark.parametrize("name", PATCHES)
def test_records_are_complete_and_their_test_exists(name):
    patch = PATCHES[name]
    file, _, test = patch.test.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()
    assert len(patch.why) > 80 and patch.upstream and patch.removal and patch.without


def test_the_installed_host_is_as_released_or_as_patched():
    assert set(patches.states().values()) <= {APPLIED, NOT_APPLIED}


_OVERLAY = """
import importlib.util, sys
from pathlib import Path
class Overlay:
    def find_spec(self, name, path=None, target=None):
        file = Path(sys.argv[1], *name.split(".")[1:]).with_suffix(".py")
        if name.startswith("sglang.") and file.is_file():
            return importlib.util.spec_from_file_location(name, file)
sys.meta_path.insert(0, Overlay())
"""


def run_with(root, program, **environment):
    """The JSON that `program` prints last, in a process whose sglang takes the files under `root`
    in place of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", _OVERLAY + program, str(root)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def patched(wheel, name):
    main(["patch", "apply", name, "--root", str(wheel), "--write"])
    return wheel


_ROUTE = """
import json, torch
from sglang.kernels.ops.moe.triton_hash_topk import hash_topk_triton
table = torch.arange(6).view(1, 6)
rows = []
for logit in (-200.0, -30.0, -18.0, -5.0, 0.0, 30.0):
    logits = torch.full((1, 8), logit); logits[0, 0] += 1
    token = torch.zeros(1, dtype=torch.int64)
    weights, ids = hash_topk_triton(logits, token, table, 1, 2.5, "sqrtsoftplus")
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 8]]
    score = torch.nn.functional.softplus(logits[0, :6].double()).sqrt()
    want = score / score.sum() if score.sum() > 1e-30 else torch.full((6,), 1 / 6)
    rows.append([bool(weights.isfinite().all()), float((weights[0, :6] - want).abs().max())])
print(json.dumps(rows))
"""


def test_hash_router_divides_zero_by_zero_until_it_is_patched(wheel):
    """The host's own Triton kernel, interpreted: NaN once all six logits are below -16.64, right
    with the patch."""
    before = run_with(wheel, _ROUTE, TRITON_INTERPRET="1")
    assert [finite for finite, _ in before] == [False, False, False, True, True, True]
    after = run_with(patched(wheel, "hash-router-underflow"), _ROUTE, TRITON_INTERPRET="1")
    # fp32 exp, log and sqrt, each good to some 2^-23, of weights near 1/6.
    assert all(finite and off < 1e-6 for finite, off in after), after


_POOL = """
import json
from sglang.srt.mem_cache import kv_cache_configurator as host
from sglang.srt.platforms.interface import SRTPlatform
own = type("Own", (host.DeepSeekV4TokenToKVPool,), {})
def resolved(answer):
    class Platform(SRTPlatform):
        if answer != "unset":
            def get_kv_pool_cls(self, *, kind): return answer
    host.current_platform = Platform()
    resolve = host.KVCacheConfigurator._resolve_kv_pool_class
    try:
        return resolve(None, kind="dsv4", default=host.DeepSeekV4TokenToKVPool).__name__
    except (KeyError, TypeError) as error:
        return type(error).__name__
spoken = open(host.__file__).read().count("the DeepSeek-V4 KV pool")
print(json.dumps([resolved("unset"), resolved(own), resolved(int), spoken]))
"""


@pytest.mark.thorough
def test_pool_asks_the_platform(wheel):
    assert run_with(wheel, _POOL) == ["KeyError", "KeyError", "KeyError", 1]
    assert run_with(patched(wheel, "pool-platform-seam"), _POOL) == [
        "DeepSeekV4TokenToKVPool",
        "Own",
        "TypeError",
        0,
    ]


_PIN = """
import ast, json, torch
from sglang.srt.model_executor import forward_batch_info as host
tree = ast.parse(open(host.__file__).read())
[value] = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
           and ast.unparse(node.targets[0]) == "self.use_pin_memory"]
batch = type("Batch", (), {"global_num_tokens_gpu": torch.zeros(1)})
print(json.dumps(bool(eval(ast.unparse(value), vars(host), {"self": batch}))))
"""


@pytest.mark.thorough
def test_pinned_memory_is_asked_of_the_platform(wheel):
    """On the plugin's CPU platform, where pinning raises without a driver."""
    assert run_with(wheel, _PIN, DSV4_DEVICE="cpu") is True
    assert run_with(patched(wheel, "pinned-memory-by-platform"), _PIN, DSV4_DEVICE="cpu") is False


_DRAFT = """
import json
from sglang.srt.layers.attention import attention_registry as registry
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.speculative.draft_utils import DraftBackendFactory
registry.ATTENTION_BACKENDS["dsv4"] = lambda runner: f"ours of {runner}"
getattr(registry, "MULTI_STEP_DRAFT_BACKENDS", {})["dsv4"] = lambda *args: f"ours of {args}"
factory = object.__new__(DraftBackendFactory)
factory.draft_model_runner, factory.topk, factory.speculative_num_steps = "draft", 1, 3
found = []
for make in (factory._create_dsv4_prefill_backend, factory._create_dsv4_decode_backend):
    try:
        found.append(make()[1])
    except Exception as error:
        found.append("in-tree")
print(json.dumps([*found, getattr(AttentionBackend, "supports_draft_extend_graph", None)]))
"""


@pytest.mark.thorough
def test_draft_backends_come_from_the_registry(wheel):
    assert run_with(wheel, _DRAFT) == ["in-tree", "in-tree", None]
    assert run_with(patched(wheel, "draft-backends-from-registry"), _DRAFT) == [
        "ours of draft",
        "ours of ('draft', 1, 3)",
        False,
    ]
