"""What is counted is exact, masks taken out are copies, and a pruned model stays an ordinary model."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils.masks import MASKS


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))


def batch(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def step(model, optimizer, data):
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


@torch.no_grad()
def assert_held(model, masks, optimizer=None):
    """Weights are exactly zero where the masks are False, with all of their optimizer's state; the others are not."""
    for name, weight in pu.prunable_weights(model).items():
        assert not weight[~masks[name]].any(), name
        assert (weight[masks[name]] != 0).float().mean() > 0.9
        for value in optimizer.state[weight].values() if optimizer is not None else ():
            if torch.is_tensor(value) and value.shape == weight.shape:
                assert not value[~masks[name]].any(), name


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_counts_are_exact_above_2_to_the_24():
    layer = nn.utils.skip_init(nn.Linear, 4100, 4100)
    nn.init.ones_(layer.weight)
    layer.weight.data[0, :3] = 0
    total = 4100 * 4100
    count = pu.count(layer)
    assert (count.total, count.kept, count.pruned) == (total, total - 3, 3) and count.sparsity == 3 / total
    pu.set_masks(layer, {"weight": layer.weight != 0})
    assert pu.count(layer).kept == pu.get_masks(layer).kept == total - 3
    assert type(count.total) is type(count.kept) is int


def test_layer_table_names_shapes_and_sparsity():
    model = net()
    assert pu.get_masks(model) == {} and pu.get_masks(model).sparsity == 0.0
    pu.prune(model, "magnitude", {"3": 0.25, "5": 0.5})
    table = pu.layer_table(model)
    assert list(table.columns) == ["layer", "shape", "total", "kept", "sparsity"]
    assert table.values.tolist() == [
        ["0", (4, 1, 3, 3), 36, 36, 0.0],
        ["3", (4, 2, 3, 3), 72, 54, 0.25],
        ["5", (5, 64), 320, 160, 0.5],
    ]
    assert pu.count(model).kept == 250


# --- Masks in and out ------------------------------------------------------------------------------------------------


def test_masks_taken_out_are_copies_however_they_are_taken():
    model = net()
    pruned = pu.prune(model, "magnitude", 0.5)
    takes = [
        lambda masks: masks["0.weight"],
        lambda masks: next(iter(masks.values())),
        lambda masks: dict(masks)["0.weight"],
        lambda masks: masks.copy()["0.weight"],
        lambda masks: pickle.loads(pickle.dumps(masks))["0.weight"],
        lambda masks: masks.pop("0.weight"),
    ]
    for take in takes:
        masks = pu.get_masks(model)
        take(masks)[:] = False
        assert isinstance(masks, dict) and pu.count(model).kept == 214 == pu.get_masks(model).kept
    deeper = pu.prune(model, "magnitude", 0.9)
    assert pruned.kept == 214 and deeper.kept == 43 and bool((deeper["5.weight"] <= pruned["5.weight"]).all())


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("6.weight", torch.zeros(4, 1, 3, 3)),
        ("5.weight", torch.ones(5, 63)),
        ("5.weight", torch.full((5, 64), 0.5)),
        ("5.weight", torch.full((5, 64), float("nan"))),
    ],
)
def test_set_masks_refuses_before_anything_is_changed(name, mask):
    model = net()
    before = copy.deepcopy(model.state_dict())
    good = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in pu.prunable_weights(model).items()}
    with pytest.raises(ValueError, match=name):
        pu.set_masks(model, good | {name: mask})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert pu.get_masks(model) == {}


# --- An ordinary model -----------------------------------------------------------------------------------------------


def test_masks_hold_with_gradient_scaling_and_accumulation():
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(data[0]), data[1])
        scaler.scale(loss).backward()
        if i % 4 == 3:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_held(model, masks, optimizer)


def test_made_permanent_a_model_is_as_before_and_training_fills_its_zeros():
    model, data = net(), batch()
    pu.prune(model, "magnitude", 0.8)
    assert pu.make_permanent(model) is model
    assert pu.get_masks(model) == {} and pu.count(model).kept == 86
    assert model.__dict__.keys() == net().__dict__.keys() and model[0].__dict__.keys() == net()[0].__dict__.keys()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    assert pu.count(model).kept > 300


def test_copies_hold_masks_of_their_own_and_restore_what_was_there_before_the_first_pruning():
    model, data, file = net(), batch(), io.BytesIO()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no weights to restore"):
        pu.restore(model)
    pu.prune(model, "magnitude", 0.5, restorable=True)
    masks = pu.prune(model, "magnitude", 0.8, restorable=True)
    torch.save(model, file)
    file.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        optimizer = torch.optim.Adam(each.parameters())
        step(each, optimizer, data)
        assert_held(each, masks, optimizer)
        deeper = pu.prune(each, "magnitude", 0.85)
        each.load_state_dict(net(3).state_dict())
        assert_held(each, deeper)
        assert pu.restore(each) is each and pu.get_masks(each) == {}
        assert all(torch.equal(w, before[name]) for name, w in pu.prunable_weights(each).items())


def test_state_dict_is_that_of_an_unpruned_twin():
    model, twin = net(0).eval(), net(1).eval()
    names = list(twin.state_dict())
    pu.prune(model, "magnitude", 0.5)
    assert list(model.state_dict()) == names and type(model[0].weight) is nn.Parameter
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(batch()[0]), twin(batch()[0])) and pu.get_masks(twin) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_follow_the_model_to_the_gpu():
    model = net()
    pu.prune(model, "magnitude", 0.5)
    model.cuda()
    assert all(mask.is_cuda for mask in pu.get_masks(model).values())
    assert pu.prune(model, "magnitude", 0.9).kept == 43


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pruning_works_without_gradients_enabled(mode):
    model = net()
    with mode():
        masks = pu.prune(model, "magnitude", 0.5)
    step(model, torch.optim.Adam(model.parameters()), batch())
    assert_held(model, masks)


def test_torch_compile_runs_and_trains_a_pruned_model():
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.8, scope="layer")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(data[0]), model(data[0]))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(compiled, optimizer, data)
    assert_held(model, masks, optimizer)
    pu.prune(model, "magnitude", 0.9, scope="layer")
    torch.testing.assert_close(compiled.eval()(data[0]), model.eval()(data[0]))


def test_onnx_export_gives_the_same_outputs_and_zeros(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, (inputs, _) = net().eval(), batch()
    masks = pu.prune(model, "magnitude", 0.8)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False, optimize=False, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(inputs).detach(), rtol=1e-4, atol=1e-5)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert int((stored["5.weight"] != 0).sum()) == int(masks["5.weight"].sum())


def test_models_that_are_dropped_leave_nothing_behind():
    gc.collect()
    before, alive = len(MASKS), []
    for seed in range(5):
        model = net(seed)
        optimizer = torch.optim.Adam(model.parameters())
        step(model, optimizer, batch())
        pu.prune(model, "magnitude", 0.5, restorable=True)
        step(model, optimizer, batch())
        alive += [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(optimizer)]
        del model, optimizer
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    assert len(MASKS) == before
