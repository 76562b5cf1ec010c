"""Released tensors into the parameters of the model: values, shares, order, and the account of what
came."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin.checkpoint.files import INDEX, CheckpointError
from dsv4_plugin.checkpoint.load import Loader, load_checkpoint
from dsv4_plugin.checkpoint.tiny import random_tensors, tiny_config
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.parallel import Group, Parallel, ParallelError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def decoded(stored: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """fp32 values of a released tensor, decoded here from the definition in docs/model.md §2."""
    tensor = stored[name]
    scale = (
        stored.get(name.removesuffix(".weight") + ".scale") if name.endswith(".weight") else None
    )
    if scale is None:
        return tensor.double().numpy() if tensor.dtype == torch.int64 else tensor.float().numpy()
    factor = (
        scale.numpy()
        if scale.dtype == torch.float32
        else np.exp2(scale.view(torch.uint8).numpy() - 127.0).astype(np.float32)
    )
    if tensor.dtype == torch.int8:
        codes = tensor.numpy().view(np.uint8)
        values = np.stack((E2M1[codes & 15], E2M1[codes >> 4]), -1).reshape(len(codes), -1)
        return values * factor.repeat(32, 1)
    rows, columns = tensor.shape
    return tensor.float().numpy() * factor.repeat(128, 0).repeat(128, 1)[:rows, :columns]


def held(model: DeepseekV4) -> dict[str, torch.Tensor]:
    """Parameters by released name; stacked experts under the names they would have on one process,
    from 0 on."""
    found = {}
    for name, parameter in model.named_parameters():
        before, marker, after = name.partition(".ffn.experts.")
        if marker:
            found |= {
                f"{before}.ffn.experts.{expert}.{after}": row
                for expert, row in enumerate(parameter)
            }
        else:
            found[name] = parameter
    return found


def loaded(directory, geometry, **keywords) -> dict[str, torch.Tensor]:
    model = DeepseekV4(geometry, Precision.EXACT, **keywords)
    load_checkpoint(model, directory)
    return held(model)


@pytest.fixture(scope="module")
def stored(golden_dir):
    """Released tensors of the golden model."""
    return load_file(golden_dir / "model.safetensors")


@pytest.fixture(scope="module")
def whole(golden_dir, golden_geometry):
    """Parameters of the golden model on one process."""
    return loaded(golden_dir, golden_geometry)


def test_every_parameter_has_its_released_value(whole, stored):
    assert whole.keys() == {name for name in stored if not name.endswith(".scale")}
    for name, parameter in whole.items():
        assert np.array_equal(
            parameter.double().numpy(), decoded(stored, name).astype(np.float64)
        ), name


def test_shards_load_like_one_file(tiny_dir):
    stored = {}
    for file in tiny_dir.glob("*.safetensors"):
        stored |= load_file(file)
    for name, parameter in loaded(tiny_dir, Geometry.from_dir(tiny_dir)).items():
        assert np.array_equal(
            parameter.double().numpy(), decoded(stored, name).astype(np.float64)
        ), name


@pytest.mark.parametrize("convert", [False, True], ids=["fp32-scales", "ue8m0-scales"])
def test_base_releases_load(convert):
    geometry = Geometry.from_config(
        tiny_config(layers=3, hidden=128, intermediate=128, expert_dtype="fp8")
    )
    stored = dict(random_tensors(geometry, seed=3))
    if convert:
        stored = {
            name: tensor.to(torch.float8_e8m0fnu) if name.endswith(".scale") else tensor
            for name, tensor in stored.items()
        }
    model = DeepseekV4(geometry, Precision.EXACT)
    fill(Loader(model, geometry, Parallel()), stored)
    for name, parameter in held(model).items():
        assert np.array_equal(
            parameter.double().numpy(), decoded(stored, name).astype(np.float64)
        ), name


def fill(loader: Loader, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        loader.put(name, tensor)
    loader.finish()


# How a rank's parameters put together again give the whole: the axis, or None for a copy on every
# rank.
SPLIT = {
    "wq_b.weight": 0,
    "wo_a.weight": 0,
    "wo_b.weight": 1,
    "attn_sink": 0,
    "embed.weight": 0,
    "head.weight": 0,
    "shared_experts.w1.weight": 0,
    "shared_experts.w3.weight": 0,
    "shared_experts.w2.weight": 1,
}
EXPERTS = {"w1.weight": 0, "w3.weight": 0, "w2.weight": 1}


def whole_axis(name: str) -> int | None:
    if ".ffn.experts." in name:
        return EXPERTS[name.split(".", 5)[-1]]
    if ".indexer." in name:
        return None
    return next((axis for end, axis in SPLIT.items() if name.endswith(end)), None)


def test_tensor_parallel_shares_make_the_whole(golden_dir, golden_geometry, whole):
    ranks = []
    for rank in range(2):
        two = Group(rank, 2)
        ranks.append(
            loaded(
                golden_dir,
                golden_geometry,
                parallel=Parallel(attention=two, expert_tensor=two, shared=two, vocab=two),
            )
        )
    for name, parameter in whole.items():
        shares = [shares[name] for shares in ranks]
        axis = whole_axis(name)
        if axis is None:
            assert all(torch.equal(share, parameter) for share in shares), name
        else:
            assert torch.equal(torch.cat(shares, axis), parameter), name


def test_expert_parallel_shares_make_the_whole(golden_dir, golden_geometry, whole):
    ranks = [
        loaded(golden_dir, golden_geometry, parallel=Parallel(expert=Group(rank, 4)))
        for rank in range(4)
    ]
    for rank, parameters in enumerate(ranks):
        for name, parameter in parameters.items():
            before, marker, after = name.partition(".ffn.experts.")
            if marker:
                local, _, matrix = after.partition(".")
                assert int(local) < 2
                name = f"{before}.ffn.experts.{2 * rank + int(local)}.{matrix}"
            assert torch.equal(parameter, whole[name]), name


@pytest.mark.parametrize("parts", ["backbone", "mtp"])
def test_parts_of_the_model(golden_dir, golden_geometry, whole, parts):
    parameters = loaded(golden_dir, golden_geometry, parts=parts)
    drafts = {name for name in whole if name.startswith("mtp.")}
    assert parameters.keys() == (
        drafts | {"embed.weight", "head.weight"} if parts == "mtp" else whole.keys() - drafts
    )
    assert all(torch.equal(parameter, whole[name]) for name, parameter in parameters.items())


def test_the_backbone_beside_a_dspark_draft(dspark_dir):
    """The draft's tensors are checked with the others and then left out."""
    parameters = loaded(dspark_dir, Geometry.from_dir(dspark_dir), parts="backbone")
    assert not any(name.startswith("mtp.") for name in parameters)
    stored = load_file(dspark_dir / "model.safetensors")
    for name, parameter in parameters.items():
        assert np.array_equal(
            parameter.double().numpy(), decoded(stored, name).astype(np.float64)
        ), name


def test_any_order(golden_geometry, stored, whole):
    names = list(stored)
    random.Random(0).shuffle(names)
    model = DeepseekV4(golden_geometry, Precision.EXACT)
    fill(Loader(model, golden_geometry, Parallel()), {name: stored[name] for name in names})
    assert all(torch.equal(parameter, whole[name]) for name, parameter in held(model).items())


@pytest.fixture
def loader(golden_geometry):
    return Loader(DeepseekV4(golden_geometry, Precision.EXACT), golden_geometry, Parallel())


def test_unknown_name(loader):
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.foo is not a tensor"):
        loader.put("model.layers.0.foo", torch.zeros(1))


@pytest.mark.parametrize(
    "tensor, told",
    [
        (torch.zeros(128, dtype=torch.float32), r"F32 \[128\], not BF16 \[128\]"),
        (torch.zeros(64, dtype=torch.bfloat16), r"BF16 \[64\], not BF16 \[128\]"),
        (
            torch.zeros(1, dtype=torch.bfloat16),
            r"BF16 \[1\], not",
        ),  # copy_ would spread a single value
        (torch.zeros(128, dtype=torch.float16), "float16"),
    ],
)
def test_wrong_tensor(loader, tensor, told):
    with pytest.raises(CheckpointError, match=f"norm.weight is .*{told}"):
        loader.put("norm.weight", tensor)


def test_tensor_that_comes_twice(loader):
    loader.put("norm.weight", torch.ones(128, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="norm.weight came twice"):
        loader.put("norm.weight", torch.ones(128, dtype=torch.bfloat16))


def test_what_never_came_is_named(stored, loader):
    absent = ["layers.3.attn.wq_a.scale", "layers.4.ffn.experts.5.w2.weight"]
    with pytest.raises(CheckpointError) as raised:
        fill(loader, {name: tensor for name, tensor in stored.items() if name not in absent})
    assert str(raised.value) == f"2 tensors never came: {', '.join(absent)}"


def test_share_that_cuts_a_block():
    # 4 groups of rank 128 over 4 processes fit; with rank 96 three blocks of 128 rows do not split
    # in 4.
    config = tiny_config(layers=1) | {"o_lora_rank": 96}
    geometry = Geometry.from_config(config)
    with pytest.raises(
        ParallelError,
        match="parallel size 4 does not divide o_groups x o_lora_rank 384 in whole blocks of 128",
    ):
        Loader(DeepseekV4(geometry, Precision.EXACT), geometry, Parallel(attention=Group(0, 4)))


def test_bad_files_are_refused_before_the_first_weight(golden_geometry, golden_dir, tmp_path):
    data = (golden_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    model = DeepseekV4(golden_geometry, Precision.EXACT)
    torch.nn.init.constant_(model.norm.weight, 7.0)
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(model, tmp_path)
    assert bool((model.norm.weight == 7.0).all())


# VmHWM, not getrusage: the latter's peak is inherited from the process that started this one.
STREAMING = """
import sys, torch
from dsv4_plugin.checkpoint.files import CheckpointFiles

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.ones(2**20, dtype=torch.int8).view(torch.int32).sum()
files = CheckpointFiles(sys.argv[1])
before, total, kept = peak(), 0, []
for name, tensor in files.tensors():
    total += tensor.nbytes
    tensor.view(torch.int32).max()  # reads every page, allocates nothing
    if sys.argv[2] == "keep":
        kept.append(tensor)
print(peak() - before, total // 1024)
"""


def test_memory_stays_near_one_shard(tmp_path):
    shard = 32 * 2**20
    files = [f"model-{index}.safetensors" for index in range(6)]
    for file in files:
        # Random bytes: a file system may keep zeros nowhere.
        save_file({file: torch.randint(-128, 128, (shard,), dtype=torch.int8)}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {file: file for file in files}}))
    growth = {}
    for mode in ("drop", "keep"):
        output = subprocess.run(
            [sys.executable, "-c", STREAMING, tmp_path, mode],
            capture_output=True,
            text=True,
            check=True,
        )
        growth[mode], total = map(int, output.stdout.split())
        assert total == 6 * shard // 1024
    # KiB. Kept tensors hold all six shards, which shows that the measure sees them; dropped ones
    # one, or two at a change.
    assert growth["keep"] > 5.5 * shard // 1024
    assert growth["drop"] < 2.5 * shard // 1024
