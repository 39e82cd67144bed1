"""PyTorch checkpoints: what fits is converted, whatever does not is named, no foreign code runs."""

import os
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models
from robustjax.benchmark.import_torch import convert, read_state_dict

WIDE = models.WideResNet(10, 1, num_classes=5)


def wide_shapes(prefix=""):
    """Names and shapes of ``robustbench``'s WideResNet(depth=10, widen_factor=1, num_classes=5)."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (5, 64), "fc.bias": (5,)}

    def norm(name, channels):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{kind}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for stage, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        block = f"block{stage}.layer.0"
        norm(f"{block}.bn1", inputs)
        shapes[f"{block}.conv1.weight"] = (outputs, inputs, 3, 3)
        norm(f"{block}.bn2", outputs)
        shapes[f"{block}.conv2.weight"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            shapes[f"{block}.convShortcut.weight"] = (outputs, inputs, 1, 1)
    norm("bn1", 64)
    return shapes


def wide_state(**changes):
    """A state dict of that network; a change of ``None`` removes the entry."""
    draw = np.random.default_rng(0)
    state = {}
    for name, shape in wide_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(7)
        else:
            state[name] = draw.uniform(0.5, 1.5, shape).astype(np.float32)
    state.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: value for name, value in state.items() if value is not None}


def test_every_array_comes_to_its_place_in_our_layout():
    state = wide_state()
    module, params, model_state = convert(state, WIDE)
    assert module == WIDE
    model = models.from_linen(WIDE)
    expected = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    converted = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (params, model_state)
    )
    assert converted == expected

    for ours, theirs in [
        (params["stem_conv"]["kernel"], state["conv1.weight"]),
        (params["stage2_block1"]["conv1"]["kernel"], state["block2.layer.0.conv1.weight"]),
        (
            params["stage3_block1"]["shortcut_conv"]["kernel"],
            state["block3.layer.0.convShortcut.weight"],
        ),
    ]:
        o, i, h, w = np.indices(theirs.shape)
        np.testing.assert_array_equal(ours[h, w, i, o], theirs)
    np.testing.assert_array_equal(params["head"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(params["head"]["bias"], state["fc.bias"])
    block, statistics = params["stage1_block1"], model_state["batch_stats"]["stage1_block1"]
    for number in (1, 2):
        theirs = f"block1.layer.0.bn{number}"
        for kind, ours in [
            ("weight", block[f"norm{number}"]["scale"]),
            ("bias", block[f"norm{number}"]["bias"]),
            ("running_mean", statistics[f"norm{number}"]["mean"]),
            ("running_var", statistics[f"norm{number}"]["var"]),
        ]:
            np.testing.assert_array_equal(ours, state[f"{theirs}.{kind}"])
    logits = models.eval_logits(model.apply, params, model_state)(jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def unused_block():
    return {
        f"sub_{name}": 2 * value
        for name, value in wide_state().items()
        if name.startswith("block1")
    }


@pytest.mark.parametrize(
    "state",
    [
        {f"module.{name}": value for name, value in wide_state().items()},
        {f"model.{name}": value for name, value in wide_state().items()},
        {f"module.model.{name}": value for name, value in wide_state().items()},
        {name: v for name, v in wide_state().items() if "num_batches" not in name},
        {**wide_state(), **unused_block()},
        {name: v.astype(np.float64) if v.ndim else v for name, v in wide_state().items()},
    ],
    ids=["module", "model", "module.model", "no counters", "sub_block1", "float64"],
)
def test_what_does_not_matter_is_not_asked_for(state):
    expected = convert(wide_state(), WIDE)
    converted = convert(state, WIDE)
    assert same(converted[1:], expected[1:]) and converted.module == expected.module
    assert {leaf.dtype for leaf in jax.tree.leaves(converted[1:])} == {np.dtype(np.float32)}


@pytest.mark.parametrize("layer", ["", "normalize.", "normalizer.", "module.normalize."])
@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std")])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), (3,)])
def test_normalisation_in_the_checkpoint_becomes_the_module_s(layer, names, shape):
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2471, 0.2435, 0.2616])
    state = {
        **{f"model.{name}": value for name, value in wide_state().items()},
        layer + names[0]: mean.reshape(shape),
        layer + names[1]: std.reshape(shape),
    }
    module, params, model_state = convert(state, WIDE)
    assert module == WIDE.clone(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    assert same((params, model_state), convert(wide_state(), WIDE)[1:])


def test_a_single_constant_serves_all_channels_and_the_module_s_own_stays():
    module = convert(wide_state(mu=np.float32(0.5), sigma=np.float32([0.25])), WIDE).module
    assert (module.mean, module.std) == ((0.5,), (0.25,))
    given = WIDE.clone(mean=0.5, std=(0.1, 0.2, 0.3))
    assert convert(wide_state(), given).module == given


def test_grey_images():
    state = wide_state(
        conv1__weight=np.ones((16, 1, 3, 3), np.float32), mu=np.zeros(1), sigma=np.ones(1)
    )
    params = convert(state, WIDE, image_channels=1).params
    assert params["stem_conv"]["kernel"].shape == (3, 3, 1, 16)


FLOATS = np.ones(64, np.float32)
FAULTS = {
    "missing": ({"fc__bias": None}, "fc.bias is missing"),
    "surplus": ({"fc2__bias": np.ones(3)}, "fc2.bias is surplus"),
    "surplus counter": (
        {"bn9__num_batches_tracked": np.array(1)},
        "num_batches_tracked is surplus",
    ),
    "surplus in the unused block": ({"sub_block1__x": np.ones(3)}, "sub_block1.x is surplus"),
    "shape": (
        {"fc__weight": np.ones((64, 5), np.float32)},
        "fc.weight has shape (64, 5), expected (5, 64)",
    ),
    "shape of the unused block": (
        {"sub_block1__layer__0__bn1__weight": np.ones(3, np.float32)},
        "sub_block1.layer.0.bn1.weight has shape (3,), expected (16,)",
    ),
    "dtype": ({"bn1__bias": FLOATS.astype(int)}, "bn1.bias has dtype int64"),
    "complex": ({"bn1__bias": FLOATS * 1j}, "bn1.bias has dtype complex"),
    "nan": ({"bn1__bias": FLOATS * np.nan}, "bn1.bias has values that are not finite"),
    "overflow": ({"bn1__bias": np.full(64, 1e300)}, "bn1.bias has values that are not finite"),
    "variance": ({"bn1__running_var": -FLOATS}, "bn1.running_var has values below 0"),
    "no array": ({"bn1__bias": "zeros"}, "bn1.bias is no named tensor"),
    "no name": ({}, "7 is no named tensor"),
    "twice": ({"module__fc__bias": np.ones(5, np.float32)}, "fc.bias is there twice"),
    "half a normalisation": ({"mu": np.ones(3)}, "sigma is missing"),
    "two normalisations": (
        {"mu": np.ones(3), "sigma": np.ones(3), "mean": np.ones(3), "std": np.ones(3)},
        "mu, sigma, mean, std are more than one normalisation",
    ),
    "channels": ({"mu": np.ones(4), "sigma": np.ones(3)}, "mu has shape (4,), expected 3 channels"),
    "a map": (
        {"mu": np.ones((3, 1, 1)), "sigma": np.ones((3, 2, 2))},
        "sigma has shape (3, 2, 2), expected 3 channels",
    ),
    "deviation": (
        {"mu": np.ones(3), "sigma": np.zeros(3)},
        "sigma has values that are not above 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault):
    changes, message = FAULTS[fault]
    state = wide_state(**changes)
    if fault == "no name":
        state[7] = np.ones(3)
    with pytest.raises(ValueError) as error:
        convert(state, WIDE)
    assert message in str(error.value)
    assert str(error.value).startswith("state_dict must fit WideResNet(depth=10, widen_factor=1")


def test_one_error_lists_everything_that_does_not_fit():
    changes = dict(pair for change, _ in FAULTS.values() for pair in change.items())
    changes.update(mean=None, std=None, sigma=np.zeros(3), bn1__bias=FLOATS * np.nan, mu=np.ones(4))
    changes["fc__bias"] = None
    changes.pop("module__fc__bias")
    with pytest.raises(ValueError) as error:
        convert(wide_state(**changes), WIDE.clone(mean=0.5))
    for message in [
        "fc.bias is missing",
        "fc2.bias is surplus",
        "bn9.num_batches_tracked is surplus",
        "sub_block1.x is surplus",
        "fc.weight has shape (64, 5), expected (5, 64)",
        "bn1.bias has values that are not finite",
        "bn1.running_var has values below 0",
        "mu has shape (4,)",
        "sigma has values that are not above 0",
        "given to the module as well",
    ]:
        assert str(error.value).count(message) == 1


def test_another_network_is_refused():
    with pytest.raises(ValueError, match=r"block1\.layer\.1\.conv1\.weight is missing"):
        convert(wide_state(), models.WideResNet(16, 1, num_classes=5))
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(5, 64\), expected \(10, 64\)"):
        convert(wide_state(), models.WideResNet(10, 1))
    with pytest.raises(ValueError, match=r"init_conv\.weight is missing.*conv1\.weight is surplus"):
        convert(wide_state(), WIDE.clone(strided_padding="end"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((wide_state(), models.SmallCNN()), "module must be a ResNet"),
        ((wide_state(), "wide_resnet"), "module must be a ResNet"),
        (([np.ones(3)], WIDE), "state_dict must be a mapping"),
    ],
    ids=["other module", "name", "list"],
)
def test_a_wrong_argument_is_refused(plain_calls, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(*arguments)


def test_image_channels_is_checked():
    with pytest.raises(ValueError, match="image_channels must be >= 1, got 0"):
        convert(wide_state(), WIDE, image_channels=0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (models.WideResNet(10, 1, activation="gelu"), "activation must be one of 'relu', 'swish'"),
        (models.WideResNet(10, 1, strided_padding="SAME"), "strided_padding must be one of"),
        (models.PreActResNet((1, 1), projection_size=2), "projection_size must be one of 1, 3"),
    ],
    ids=["activation", "strided_padding", "projection_size"],
)
def test_a_wrong_setting_of_a_network_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        convert(wide_state(), module)


# Files. None of these needs PyTorch but those that ask for it.


class Malicious:
    """When unpickled, makes the directory ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_archive_of_arrays_is_read(tmp_path):
    np.savez(tmp_path / "weights.npz", **wide_state())
    state = read_state_dict(tmp_path / "weights.npz")
    assert same(convert(state, WIDE)[1:], convert(wide_state(), WIDE)[1:])
    assert read_state_dict(str(tmp_path / "weights.npz")).keys() == wide_state().keys()


def test_an_archive_runs_no_code(tmp_path):
    objects = np.array([Malicious(str(tmp_path / "harm"))], dtype=object)
    np.savez(tmp_path / "evil.npz", weight=np.ones(3), evil=objects)
    with pytest.raises(ValueError, match=r"evil\.npz must be an archive of plain arrays"):
        read_state_dict(tmp_path / "evil.npz")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Malicious(str(tmp_path / "harm"))))
    with pytest.raises(ValueError, match=r"pickle\.npz must be an archive of plain arrays"):
        read_state_dict(tmp_path / "pickle.npz")
    assert not (tmp_path / "harm").exists()
    np.load(tmp_path / "evil.npz", allow_pickle=True)["evil"]
    assert (tmp_path / "harm").exists()  # the file does harm to those who let it


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_checkpoint_runs_no_code(tmp_path, form):
    torch = pytest.importorskip("torch")
    path, evil = tmp_path / "evil.pt", Malicious(str(tmp_path / "harm"))
    if form == "pickle":
        path.write_bytes(pickle.dumps({"conv1.weight": evil}, protocol=2))
    else:
        torch.save({"conv1.weight": torch.ones(3), "evil": evil}, path)
        assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"evil\.pt must be a checkpoint of tensors alone"):
        read_state_dict(path)
    assert not (tmp_path / "harm").exists()
    torch.load(path, weights_only=False) if form == "zip" else pickle.loads(path.read_bytes())
    assert (tmp_path / "harm").exists()


def test_a_whole_module_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module\.pt must be a checkpoint of tensors alone"):
        read_state_dict(tmp_path / "module.pt")


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "twice"])
def test_a_checkpoint_is_read(tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value) for name, value in wide_state().items()}
    tensors["fc.bias"] = torch.nn.Parameter(tensors["fc.bias"].to(torch.bfloat16))
    content = {
        "bare": tensors,
        "state_dict": {"state_dict": tensors},
        "twice": {"last": {"model": tensors}},
    }[wrapped]
    torch.save(content, tmp_path / "weights.pt")
    state = read_state_dict(tmp_path / "weights.pt")
    assert state.keys() == tensors.keys()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    params = convert(state, WIDE).params
    np.testing.assert_array_equal(params["head"]["kernel"].T, wide_state()["fc.weight"])
    np.testing.assert_allclose(params["head"]["bias"], wide_state()["fc.bias"], rtol=2**-8)
    # PyTorch tensors themselves will do.
    assert same(convert(tensors, WIDE)[1:], convert(state, WIDE)[1:])


def test_a_file_with_more_in_it_needs_the_entry_named(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"fc.bias": torch.ones(3)}
    path = tmp_path / "training.pt"
    torch.save({"state_dict": weights, "optimizer": {"lr": 0.1}, "epoch": 10}, path)
    with pytest.raises(ValueError) as error:
        read_state_dict(path)
    for part in ("state_dict (dict)", "optimizer (dict)", "epoch (int)", "entry='state_dict'"):
        assert part in str(error.value)
    assert read_state_dict(path, entry="state_dict").keys() == {"fc.bias"}
    with pytest.raises(ValueError, match=r"nothing but named tensors, got lr \(float\)"):
        read_state_dict(path, entry="optimizer")
    with pytest.raises(ValueError, match=r"got int"):
        read_state_dict(path, entry="epoch")
    with pytest.raises(ValueError, match=r"state_dict, optimizer, epoch; got 'last'"):
        read_state_dict(path, entry="last")


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    for content, message in [
        (torch.ones(3), "must hold a dict of tensors, got Tensor"),
        ([torch.ones(3)], "must hold a dict of tensors, got list"),
        ({}, "got none"),
        ({"a": torch.ones(3), 1: torch.ones(3)}, r"got 1 \(Tensor\)"),
        ({"a": torch.ones(3), "b": torch.ones(3).to_sparse()}, r"got b \(Tensor\)"),
        ({"a": torch.ones(3), "b": None}, r"got b \(NoneType\)"),
    ]:
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / "weights.pt")


def test_a_damaged_file_is_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", **wide_state())
    whole = (tmp_path / "weights.npz").read_bytes()
    (tmp_path / "weights.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be an archive of plain arrays"):
        read_state_dict(tmp_path / "weights.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match="must be an archive of plain arrays"):
        read_state_dict(tmp_path / "array.npz")
    pytest.importorskip("torch")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="must be a checkpoint of tensors alone"):
        read_state_dict(tmp_path / "text.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ValueError, match="path must be a file that exists"):
            read_state_dict(path)


def test_without_pytorch_or_with_an_unsafe_one_the_error_says_so(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"fc.bias": [1.0]}))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"\.npz where PyTorch is not installed"):
        read_state_dict(tmp_path / "weights.pt")
    np.savez(tmp_path / "weights.npz", a=np.ones(3))
    assert read_state_dict(tmp_path / "weights.npz").keys() == {"a"}

    class OldTorch:
        __version__ = "2.5.1+cpu"

    monkeypatch.setitem(sys.modules, "torch", OldTorch)
    with pytest.raises(ValueError, match=r"PyTorch must be >= 2\.6 .* got 2\.5\.1"):
        read_state_dict(tmp_path / "weights.pt")
