"""The ensemble: exact on linear models, resumable, the same on any number of devices, flagged."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import linear_models as world
import numpy as np
import pytest

from robustjax import attacks, parallel
from robustjax.benchmark import ChunkedAttack, auto_attack, benchmark, ensemble
from robustjax.benchmark.batches import BatchedFunction
from robustjax.losses import dlr
from robustjax.metrics.accuracy import correct
from robustjax.norms import L1, L2, LInf
from robustjax.threat import ThreatModel

KEY = jax.random.key(0)
ONE = parallel.device_mesh(jax.devices()[:1])
RNG = np.random.default_rng(3)
X = RNG.uniform(size=(40, 4, 4, 1)).astype(np.float32)
PARAMS = (
    RNG.normal(size=(16, 24)).astype(np.float32),
    RNG.normal(size=(24, 6)).astype(np.float32),
)


def network_of(params, x):
    return jax.nn.relu((x - 0.5).reshape(len(x), -1) @ params[0]) @ params[1]


def network(x):
    return network_of(PARAMS, x)


NETWORK = jax.tree_util.Partial(network_of, PARAMS)
Y = np.asarray(jnp.argmax(NETWORK(X), axis=-1), np.int32)
THREAT = ThreatModel(LInf(), 0.06)
SHORT = {
    "apgd-ce": functools.partial(attacks.apgd, steps=15),
    "fab-t": functools.partial(attacks.fab_targeted, targets=3, steps=10, early_stop=True),
    "square": functools.partial(attacks.square, queries=120),
}


@pytest.fixture(scope="module")
def short():
    return auto_attack(SHORT, batch_size=16, mesh=ONE)


@pytest.fixture(scope="module")
def outcome(short):
    return short(NETWORK, THREAT, KEY, X, Y)


@pytest.fixture(scope="module")
def standard():
    return auto_attack(batch_size=24, mesh=ONE)


@pytest.mark.parametrize("boxed", [False, True], ids=["free", "box"])
@pytest.mark.parametrize("norm", [LInf(), L2()], ids=lambda n: n.name)
def test_standard_is_exact_on_linear_models(norm, boxed, standard):
    threat = world.threat(norm, boxed)
    result = standard(world.linear, threat, KEY, world.X, world.Y)
    np.testing.assert_array_equal(result.robust, world.robust(norm, boxed))
    assert result.clean_accuracy == 1
    assert threat.contains(jnp.array(result.x_adv), jnp.array(world.X)).all()
    assert [a.name for a in result.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [flag.name for flag in result.flags] == ["classes"]


def test_l1_ensemble_is_exact_on_linear_models():
    makers = {
        "apgd-ce": attacks.apgd,
        "apgd-dlr": functools.partial(attacks.apgd, loss=dlr),
        "fab-t": functools.partial(attacks.fab_targeted, targets=4, early_stop=True),
    }
    run = auto_attack(makers, batch_size=24, mesh=ONE)
    result = run(world.linear, world.threat(L1(), True), KEY, world.X, world.Y)
    np.testing.assert_array_equal(result.robust, world.robust(L1(), True))


def test_records_tell_what_happened(outcome):
    clean = np.asarray(correct(NETWORK(X), jnp.array(Y)))
    np.testing.assert_array_equal(outcome.correct, clean)
    standing = clean.sum()
    for record in outcome.attacks:
        assert record.attacked == standing
        standing -= record.broken
        assert record.robust_accuracy == pytest.approx(standing / len(X))
        assert record.seconds >= record.compile_seconds >= 0
    assert outcome.robust.sum() == standing
    np.testing.assert_array_equal(correct(NETWORK(outcome.x_adv), jnp.array(Y)), outcome.robust)
    assert THREAT.contains(jnp.array(outcome.x_adv), jnp.array(X)).all()
    assert 0 < outcome.robust_accuracy < 1
    assert (outcome.attacks[2].rounds, outcome.attacks[0].steps) == (1, 16)
    state, rows = outcome.states["square"]
    assert len(state.queries) == len(rows) == outcome.attacks[2].attacked


def test_misclassified_examples_are_kept_as_they_are(short):
    wrong = (Y + 1) % 6
    result = short(NETWORK, THREAT, KEY, X, wrong)
    np.testing.assert_array_equal(result.x_adv, X)
    assert result.robust_accuracy == 0
    assert [record.attacked for record in result.attacks] == [0, 0, 0]


@pytest.mark.parametrize("devices", [2, 8])
def test_the_same_on_any_number_of_devices_and_batch_sizes(devices, outcome):
    mesh = parallel.device_mesh(jax.devices()[:devices])
    result = auto_attack(SHORT, batch_size=8, mesh=mesh)(NETWORK, THREAT, KEY, X, Y)
    np.testing.assert_array_equal(result.robust, outcome.robust)
    np.testing.assert_allclose(result.x_adv, outcome.x_adv, atol=1e-5)


def test_an_example_depends_on_its_index_alone(short, outcome):
    part = np.array([3, 17, 20, 39])
    result = short(NETWORK, THREAT, KEY, X[part], Y[part], index=part)
    np.testing.assert_allclose(result.x_adv, outcome.x_adv[part], atol=1e-5)


def test_radius_and_parameters_do_not_recompile(short, outcome):
    for few in (3, 40):  # in small and in full batches, where all stay robust to the end
        short(NETWORK, ThreatModel(LInf(), 1e-6), KEY, X[:few], Y[:few])
    order = RNG.permutation(24)  # of the hidden units: the same function, up to rounding
    other = jax.tree_util.Partial(network_of, (PARAMS[0][:, order], PARAMS[1][order]))
    for model, eps in ((NETWORK, 0.03), (other, 0.06)):
        result = short(model, ThreatModel(LInf(), eps), KEY, X, Y)
        assert [record.compile_seconds for record in result.attacks] == [0, 0, 0]
    np.testing.assert_array_equal(result.robust, outcome.robust)


def test_adding_an_attack_never_raises_robust_accuracy(outcome):
    values = [record.robust_accuracy for record in outcome.attacks]
    assert values == sorted(values, reverse=True)


def test_logit_scaling_fools_pgd_and_not_auto_attack(standard):
    """Multiplied by 2^17 the gradients of cross-entropy vanish in float32."""
    scaled = jax.tree_util.Partial(network_of, (PARAMS[0], PARAMS[1] * 2.0**17))
    pgd = functools.partial(attacks.pgd, steps=50, step_size=0.015, restarts=2, select="any")
    fooled = auto_attack({"pgd": pgd}, batch_size=20, mesh=ONE)
    plain, masked = (fooled(m, THREAT, KEY, X, Y).robust_accuracy for m in (NETWORK, scaled))
    assert masked > plain + 0.2
    a, b = (standard(m, THREAT, KEY, X, Y) for m in (NETWORK, scaled))
    assert b.robust_accuracy == a.robust_accuracy <= plain


def test_plain_network_raises_no_flag(outcome):
    assert outcome.flags == ()


def test_square_after_a_blind_attack_raises_the_flag():
    """White-box attacks on a model that quantises its inputs see no gradient; Square does."""

    def quantised(x):
        return network_of(PARAMS, jnp.floor(x * 16) / 16)

    y = np.asarray(jnp.argmax(quantised(X), axis=-1), np.int32)
    makers = {name: SHORT[name] for name in ("apgd-ce", "square")}
    result = auto_attack(makers, batch_size=20, mesh=ONE)(
        quantised, ThreatModel(LInf(), 0.15), KEY, X, y
    )
    assert {"zero_gradient", "unreliable"} <= {flag.name for flag in result.flags}


def test_randomised_model():
    def noisy(x, keys):
        noise = jax.vmap(lambda k, x: jax.random.normal(k, x.shape))(keys, x)
        return network_of(PARAMS, x + 0.05 * noise)

    makers = {"apgd-ce": functools.partial(attacks.apgd, steps=10, eot=4)}
    run = auto_attack(makers, batch_size=20, mesh=ONE, randomized=True)
    result = run(noisy, THREAT, KEY, X, Y)
    assert "randomized" in {flag.name for flag in result.flags}
    assert 0 < result.robust_accuracy < result.clean_accuracy


def test_versions():
    assert list(ensemble("standard", 10)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(ensemble("plus", 10)) == [
        "apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t",
    ]  # fmt: skip
    assert list(ensemble("rand", 10)) == ["apgd-ce", "apgd-dlr"]
    assert list(ensemble("original", 10)) == ["apgd-ce", "apgd-dlr", "fab", "square"]
    assert list(ensemble("standard", 3)) == ["apgd-ce", "fab-t", "square"]
    built = {name: make(THREAT) for name, make in ensemble("plus", 10).items()}
    assert {name: attack.rounds for name, attack in built.items()} == {
        "apgd-ce": 5, "apgd-dlr": 5, "fab": 5, "square": 1, "apgd-t": 9, "fab-t": 9,
    }  # fmt: skip


def test_every_attack_resumes_at_any_chunk(short, outcome, tmp_path):
    """A run that ends at a chunk and goes on from the file gives the undisturbed result."""

    class Interruption(Exception):
        pass

    path = tmp_path / "state.npz"
    stops = 0
    while True:
        saves = []

        def interrupt(header, arrays, saves=saves, before=stops):
            saves.append(header)
            if len(saves) > 2:
                raise Interruption

        try:
            result = _run_with_hook(short, path, interrupt)
        except Interruption:
            stops += 1
            continue
        break
    assert stops >= 5
    np.testing.assert_array_equal(result.x_adv, outcome.x_adv)
    assert [r[:4] for r in result.attacks] == [r[:4] for r in outcome.attacks]
    again = short(NETWORK, THREAT, KEY, X, Y, state_path=path)
    np.testing.assert_array_equal(again.x_adv, outcome.x_adv)
    assert again.attacks == result.attacks


def _run_with_hook(run, path, hook):
    """Runs with a call of ``hook`` after each save, every chunk being saved."""
    from robustjax.benchmark import state_file

    original = state_file.write

    def write(path, header, arrays):
        original(path, header, arrays)
        hook(header, arrays)

    patch = pytest.MonkeyPatch()
    patch.setattr(state_file, "write", write)
    try:
        return run(NETWORK, THREAT, KEY, X, Y, state_path=path, save_every=0.0)
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"threat": ThreatModel(LInf(), 0.05)}, "eps"),
        ({"threat": ThreatModel(L2(), 0.06)}, "norm"),
        ({"key": jax.random.key(1)}, "key"),
        ({"x": X[::-1].copy()}, "data"),
        ({"model": jax.tree_util.Partial(network_of, (PARAMS[0], PARAMS[1] * 2))}, "model"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_state_of_another_evaluation_is_refused(short, tmp_path_factory, change, name):
    path = tmp_path_factory.getbasetemp() / "finished.npz"
    if not path.exists():
        short(NETWORK, THREAT, KEY, X, Y, state_path=path)
    given = {"model": NETWORK, "threat": THREAT, "key": KEY, "x": X, "y": Y, **change}
    with pytest.raises(ValueError, match=f"must be of this evaluation, its {name} is"):
        short(*given.values(), state_path=path)


def test_damaged_state_file_is_refused(short, tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="is not a state file, or damaged"):
        short(NETWORK, THREAT, KEY, X, Y, state_path=path)


def test_infeasible_attack_is_named():
    def outside(threat):
        return lambda logits_fn, key, x, y: x + 10 * threat.eps

    with pytest.raises(ValueError, match="attack outside must return points of the threat model"):
        auto_attack({"outside": outside}, batch_size=20, mesh=ONE)(NETWORK, THREAT, KEY, X, Y)


def test_record_is_json():
    result = benchmark(
        NETWORK, X, Y, THREAT, {"apgd-ce": SHORT["apgd-ce"]}, batch_size=20, mesh=ONE, seed=5,
        model_name="net", dataset="noise",
    )  # fmt: skip
    record = json.loads(json.dumps(result.to_json()))
    assert record["robust_accuracy"] == result.outcome.robust.mean()
    assert record["attacks"][0]["name"] == "apgd-ce"
    assert (record["norm"], record["eps"], record["seed"]) == ("linf", 0.06, 5)
    assert record["version"] == "custom"
    assert record["environment"]["versions"]["jax"] == jax.__version__


def test_batches_pad_and_keep_the_order():
    double = BatchedFunction(lambda fixed, numbers, rows: fixed * rows + numbers[0], batch_size=8)
    values = np.arange(37, dtype=np.float32)
    fixed = double.place(jnp.float32(2))
    np.testing.assert_array_equal(double(fixed, (np.float32(1),), values), 2 * values + 1)
    chosen = np.array([30, 2, 9])
    np.testing.assert_array_equal(
        double(fixed, (np.float32(0),), values, chosen), 2 * values[chosen]
    )


def test_chunks_give_what_the_attack_gives_in_one_piece():
    attack = attacks.apgd(THREAT, steps=15)
    whole = jax.jit(attack, static_argnums=0)(network, KEY, jnp.array(X), jnp.array(Y))
    chunked = ChunkedAttack(functools.partial(attacks.apgd, steps=15), batch_size=16, mesh=ONE)
    x_adv, state = chunked(NETWORK, THREAT, KEY, X, Y, np.arange(len(X), dtype=np.int32))
    np.testing.assert_allclose(x_adv, whole, atol=1e-6)
    np.testing.assert_array_equal(state.success, ~np.asarray(correct(NETWORK(x_adv), jnp.array(Y))))


KILLED = """
    import sys, time
    import jax
    sys.path.insert(0, sys.argv[1])
    from test_benchmark_auto_attack import KEY, NETWORK, ONE, SHORT, THREAT, X, Y
    from robustjax.benchmark import auto_attack, state_file
    original = state_file.write
    def write(path, header, arrays):
        original(path, header, arrays)
        print("saved", flush=True)
    state_file.write = write
    auto_attack(SHORT, batch_size=16, mesh=ONE)(
        NETWORK, THREAT, KEY, X, Y, state_path=sys.argv[2], save_every=0.0)
    time.sleep(600)
"""


def test_killed_process_loses_nothing(short, outcome, tmp_path):
    """SIGKILL in the middle of the second attack; the next run ends with the same result."""
    path = tmp_path / "state.npz"
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), here, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{Path(here).parent}"},
    )
    try:
        for _ in range(5):
            assert process.stdout.readline() == "saved\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
    assert 0 < len(header["records"]) < 3
    result = short(NETWORK, THREAT, KEY, X, Y, state_path=path)
    np.testing.assert_allclose(result.x_adv, outcome.x_adv, atol=1e-6)
    np.testing.assert_array_equal(result.robust, outcome.robust)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auto_attack("fast"), "version must be one of 'standard', 'plus'"),
        (lambda: auto_attack({}), "version must be one of standard"),
        (lambda: auto_attack({"a": "pgd"}), "attack a must be a function, got 'pgd'"),
        (lambda: auto_attack(SHORT)(3, THREAT, KEY, X, Y), "logits_fn must be a function, got 3"),
        (lambda: auto_attack(SHORT)(NETWORK, "linf", KEY, X, Y), "threat must be a ThreatModel"),
        (
            lambda: auto_attack(SHORT)(NETWORK, ThreatModel(LInf(), jnp.ones(40)), KEY, X, Y),
            "eps must be one number",
        ),
        (lambda: auto_attack(SHORT)(NETWORK, THREAT, KEY, X + 1, Y), "x must lie in"),
        (lambda: auto_attack(SHORT)(NETWORK, THREAT, KEY, X, Y + 6), "y must lie in 0 .. 5"),
        (lambda: auto_attack(SHORT)(NETWORK, THREAT, 0, X, Y), "key must be a typed key"),
        (lambda: auto_attack(SHORT, batch_size=9), r"batch_size \(9\) must be divisible"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
