"""ProMoE: gate and learned predictors at stride d, their order, and the predictor's file."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from baselines.promoe import LearnedPredictor, ProMoEPolicy, promoe
from experiments.train.predictor import Recording, top_k_accuracy, train
from finemoe.offload.policy import Gate, GateWeights, Iteration, ModelShape
from tests.finemoe.offload.states import asked, decode
from tests.finemoe.offload.states import gate as spoken

SHAPE = ModelShape(layers=4, experts=3, top_k=1, hidden_size=2)
DECODE = decode(1, 0)
PREFILL = Iteration(0, "prefill", (0,), (2,))
TRAINING = OmegaConf.create(
    {"hidden_units": 16, "epochs": 60, "tokens_per_step": 32, "learning_rate": 1e-2, "seed": 0}
)


def gate(layer: int, *inputs: list[float]) -> Gate:
    return spoken(layer, *[(1 / 3,) * 3] * len(inputs), hidden=inputs)


def gates() -> GateWeights:
    weight = np.zeros((4, 3, 2), np.float32)
    weight[2] = [[1, 0], [0, 1], [-1, -1]]
    weight[3] = [[0, 1], [1, 0], [-1, -1]]
    return GateWeights(weight)


def test_the_gate_at_the_stride_predicts_the_nearest_layer_first() -> None:
    policy = promoe(SHAPE, prefetch_distance=2)
    assert isinstance(policy, ProMoEPolicy)
    policy.set_gates(gates())
    # Softmax of (3, 0, -3), plus the layers that are left from the target on.
    best = 1 / (1 + np.exp(-3) + np.exp(-6))
    near = asked(policy.on_gate(DECODE, gate(0, [3, 0])))
    assert near == pytest.approx({(2, 0): 2 + best})
    far = asked(policy.on_gate(DECODE, gate(1, [3, 0])))
    assert far == pytest.approx({(3, 1): 1 + best})
    assert policy.on_gate(DECODE, gate(2, [3, 0])) is None


def test_tokens_are_united_and_extra_experts_added() -> None:
    policy = promoe(SHAPE, prefetch_distance=2)
    policy.set_gates(gates())
    both = policy.on_gate(PREFILL, gate(0, [3, 0], [0, 2]))
    assert list(asked(both)) == [(2, 0), (2, 1)]
    more = promoe(SHAPE, prefetch_distance=2, extra=1)
    more.set_gates(gates())
    assert list(asked(more.on_gate(DECODE, gate(0, [3, 0])))) == [(2, 0), (2, 1)]


def test_with_prefill_code_no_prompt_predicts_and_a_token_does_the_nexts_first_layers() -> None:
    policy, weights = promoe(SHAPE, prefetch_distance=2, prefill="code"), gates()
    weights.weight[:2] = [[1, 0], [0, 1], [-1, -1]], [[0, 1], [1, 0], [-1, -1]]
    policy.set_gates(weights)
    for layer in range(4):
        assert policy.on_gate(PREFILL, gate(layer, [3, 0], [0, 2])) is None
    assert policy.end_iteration(PREFILL) is None
    assert list(asked(policy.on_gate(DECODE, gate(0, [3, 0])))) == [(2, 0)]
    for layer in (1, 2, 3):
        policy.on_gate(DECODE, gate(layer, [3, 0] if layer < 3 else [0, 3]))
    # Softmax of (0, 3, -3) at layer 0, of (3, 0, -3) at layer 1, plus the layers left: 4 and 3.
    best = 1 / (1 + np.exp(-3) + np.exp(-6))
    assert asked(policy.end_iteration(DECODE)) == pytest.approx(
        {(0, 1): 4 + best, (1, 0): 3 + best}
    )
    assert promoe(SHAPE, prefetch_distance=2).end_iteration(DECODE) is None


def predictor() -> LearnedPredictor:
    up = np.array([[[1, 0], [0, 1]], [[1, 0], [0, 1]]], np.float32)
    down = np.array([[[1, 0], [0, 1], [0, 0]], [[0, 0], [0, 1], [1, 0]]], np.float32)
    up_bias = np.zeros((2, 2), np.float32)
    return LearnedPredictor(up, up_bias, down, np.array([[0, 0, 0.5]] * 2, np.float32))


def test_a_saved_predictor_is_used_for_its_source_layer(tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    predictor().save(path, 2, {"model": "test"})
    policy = ProMoEPolicy(SHAPE, 2, "learned", str(path))
    assert list(asked(policy.on_gate(DECODE, gate(0, [3, 0])))) == [(2, 0)]
    assert list(asked(policy.on_gate(DECODE, gate(1, [3, 0])))) == [(3, 2)]


def test_a_predictor_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    with pytest.raises(ValueError, match="cannot be read as up"):
        promoe(SHAPE, prefetch_distance=2, predictor="learned", predictor_path=str(path))
    predictor().save(path, 2, {})
    with pytest.raises(ValueError, match="is for distance '2', not '1'; train it"):
        promoe(SHAPE, prefetch_distance=1, predictor="learned", predictor_path=str(path))


def test_training_learns_what_an_input_determines() -> None:
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(3, 400, 2)).astype(np.float32)
    chosen = np.zeros((3, 400, 2), bool)
    # Layer 1 follows the sign of layer 0's first input, layer 2 that of layer 1's second.
    for layer, column in ((1, 0), (2, 1)):
        positive = hidden[layer - 1, :, column] > 0
        chosen[layer] = np.stack([positive, ~positive], axis=1)
    learned = Recording(hidden[:, :300], chosen[:, :300])
    held_out = Recording(hidden[:, 300:], chosen[:, 300:])
    trained = train(learned, 1, TRAINING)
    assert min(top_k_accuracy(trained, held_out, 1, 1)) > 0.9
    shuffled = Recording(hidden[:, 300:], chosen[:, 100:200])
    assert max(top_k_accuracy(trained, shuffled, 1, 1)) < 0.7
