"""What is prunable: types that a line adds, weights of several layers, what is left out, tied and computed weights."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import pruneutils as pu
from pruneutils import _left_out, _prunable, _torchvision


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Every test has a table of its own."""
    monkeypatch.setattr(_prunable, "RULES", dict(_prunable.RULES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Language(nn.Module):
    """GPT-2 in small: an embedding that is the decoder too, and Conv1D layers."""

    def __init__(self, width=8, tokens=20):
        super().__init__()
        self.wte, self.mlp = nn.Embedding(tokens, width), nn.Sequential(Conv1D(4 * width, width), nn.GELU())
        self.proj, self.lm_head = Conv1D(width, 4 * width), nn.Linear(width, tokens, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        return self.lm_head(self.proj(self.mlp(self.wte(tokens))))


TOKENS = torch.arange(6)[None]


# --- Types -----------------------------------------------------------------------------------------------------------


def test_attention_and_conv1d_are_prunable_from_the_start():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "narrow": nn.MultiheadAttention(4, 2, kdim=3)})
    assert {name: tuple(weight.shape) for name, weight in pu.prunable_weights(model).items()} == {
        "attention.in_proj_weight": (12, 4),
        "attention.out_proj.weight": (4, 4),
        "narrow.q_proj_weight": (4, 4),
        "narrow.k_proj_weight": (4, 3),
        "narrow.v_proj_weight": (4, 4),
        "narrow.out_proj.weight": (4, 4),
    }
    assert list(pu.prunable_weights(Language(), "lm_head")) == ["mlp.0.weight", "proj.weight"]

    class Conv1D(nn.Module):  # of the same name, by somebody else
        weight = nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(ValueError, match="has no convolution or linear layer: nothing to prune; pu.prunable makes"):
        pu.prunable_weights(Conv1D())


def test_one_line_adds_a_type_and_takes_it_away():
    model = nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2), nn.Embedding(4, 2))
    pu.prunable(nn.Bilinear, "weight")
    pu.prunable(nn.Linear, "weight", "bias")
    assert list(pu.prunable_weights(model)) == ["0.weight", "0.bias", "1.weight"]
    assert list(pu.prunable_weights(model, ["0.bias", "1"])) == ["0.weight"]
    pu.prunable(nn.Linear)
    pu.prunable("torch.nn.modules.sparse.Embedding", "w*")
    assert list(pu.prunable_weights(model)) == ["1.weight", "2.weight"]
    for kind in (3, nn.Linear(2, 2), torch.Tensor):
        with pytest.raises(TypeError, match="kind must be a module type or its full name"):
            pu.prunable(kind, "weight")
    with pytest.raises(TypeError, match="parameters must be names such as 'weight', not 3"):
        pu.prunable(nn.Linear, 3)


def test_subclasses_follow_the_nearest_type():
    class Mine(nn.Linear):
        pass

    class Special(Mine):
        pass

    pu.prunable(Mine)
    pu.prunable(Special, "bias")
    model = nn.Sequential(nn.Linear(2, 2), Mine(2, 2), Special(2, 2))
    assert list(pu.prunable_weights(model)) == ["0.weight", "2.bias"]


@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "snip", "grasp", "fisher", "random"])
def test_biases_embeddings_and_recurrent_weights_on_request(criterion):
    pu.prunable(nn.Linear, "weight", "bias")
    pu.prunable(nn.Embedding, "weight")
    pu.prunable(nn.LSTM, "weight_*", parts={"weight_*": "ifgo"})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Embedding(9, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 9)

        def forward(self, tokens):
            return self.three(self.two(self.one(tokens))[0][:, -1])

    torch.manual_seed(0)
    model, data = Net(), (torch.randint(0, 9, (8, 5)), torch.randint(0, 9, (8,)))
    total = 36 + 4 * 3 * (4 + 3) + 27 + 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.TiedScoresWarning)
        warnings.simplefilter("ignore", pu.LayerCollapseWarning)
        assert pu.prune(model, criterion, 0.5, data=data).total == pu.count(model).total == total
    assert pu.count(model).pruned == round(0.5 * total) and "three.bias" in pu.layer_table(model)["layer"].tolist()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1)
    masks = pu.get_masks(model)
    for _ in range(3):
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    price = pu.cost(model, data[0])
    assert price.prunable == total and price.kept == pu.count(model).kept
    again = Net()
    again.load_state_dict(model.state_dict())
    pu.set_masks(again, masks)
    assert torch.equal(again(data[0]), model(data[0]))


def test_wrong_names_of_layers_are_told():
    model = nn.ModuleDict({"layer1": nn.Sequential(nn.Linear(2, 2)), "fc": nn.Linear(2, 2), "none": nn.Linear(2, 2)})
    model["none"].weight = nn.Parameter(torch.empty(2, 0))
    assert list(pu.prunable_weights(model)) == ["layer1.0.weight", "fc.weight"]  # one of size zero has no weights
    with pytest.raises(
        ValueError, match=r"no prunable layer fits 'layer1'; did you mean 'layer1.\*', the layers inside"
    ):
        pu.prunable_weights(model, "layer1")
    for exclude, message in (
        (model["fc"], "exclude takes the names or globs of layers, not a Linear; say 'fc'"),
        ([3], "exclude takes the names or globs of layers, not 3"),
        (3, "exclude must be names or globs of layers"),
    ):
        with pytest.raises(TypeError, match=message):
            pu.prunable_weights(model, exclude)


# --- Weights of several layers ---------------------------------------------------------------------------------------


@given(sparsity=st.floats(0, 1), scope=st.sampled_from(["layer", "erk"]), seed=st.integers(0, 99), again=st.booleans())
@settings(max_examples=60, deadline=None)
def test_queries_keys_and_values_compete_as_three_layers(sparsity, scope, seed, again):
    """The masks are those of a model in which the three are linear layers of their own."""
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(6, 2)
    parts = {label: nn.Linear(6, 6) for label in "qkv"} | {"out": nn.Linear(6, 6)}
    for layer, weight in zip(parts.values(), (*attention.in_proj_weight.chunk(3), attention.out_proj.weight)):
        layer.weight.data.copy_(weight.detach())
    twin = nn.ModuleDict(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.LayerCollapseWarning)
        for share in (sparsity / 2, sparsity) if again and scope == "layer" else (sparsity,):
            found = pu.prune(attention, sparsity=share, scope=scope)
            expected = pu.prune(twin, sparsity=share, scope=scope)
    stacked = torch.cat([expected[f"{label}.weight"] for label in "qkv"])
    assert torch.equal(found["in_proj_weight"], stacked)
    assert torch.equal(found["out_proj.weight"], expected["out.weight"])


def test_a_part_has_a_name():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(4, 4)})
    before = model["a"].in_proj_weight.detach().clone()
    masks = pu.prune(model, sparsity={"a": 0.5, "b": 0.25}, iterations=2, restorable=True)
    assert [int(part.sum()) for part in masks["a.in_proj_weight"].chunk(3)] == [8, 8, 8] and masks[
        "b.weight"
    ].sum() == 12
    assert torch.equal(pu.restore(model)["a"].in_proj_weight, before)
    masks = pu.prune(model, sparsity={"a.in_proj_weight[k]": 0.75})
    assert [int(part.sum()) for part in masks["a.in_proj_weight"].chunk(3)] == [16, 4, 16] and len(masks) == 1
    masks = pu.prune(model, sparsity={"a.in_proj_weight": 0.75})
    assert [int(part.sum()) for part in masks["a.in_proj_weight"].chunk(3)] == [4, 4, 4]
    with pytest.warns(pu.LayerCollapseWarning, match=r"1 of 3 layers have no weight left: a.in_proj_weight\[q\]"):
        pu.prune(model, lambda model, data: {"a.in_proj_weight": before.abs()}, {"a.in_proj_weight[q]": 1.0})


def test_attention_computes_with_what_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), nn.Linear(8, 3))
    x, y = torch.randn(4, 5, 8), torch.randint(0, 3, (4, 5))
    data, loss_fn = (x, y), lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten())
    for name in ("snip", "magnitude", "taylor"):
        each = copy.deepcopy(model)
        pu.prune(each, name, 0.6, data=data, loss_fn=loss_fn)
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            for key, mask in pu.get_masks(each).items():
                by_hand.get_parameter(key).mul_(mask)
        torch.testing.assert_close(each.eval()(x), by_hand.eval()(x))
    with pytest.raises(ValueError, match="'wanda' gives no scores for 0.self_attn.in_proj_weight; exclude that layer"):
        pu.scores(model, "wanda", data)
    price = pu.cost(model, x)
    assert price.macs - price.sparse_macs == 0 and price.prunable == 4 * 64 + 2 * 128 + 24


# --- (in, out) -------------------------------------------------------------------------------------------------------


def test_transposed_weights_are_pruned_one_by_one():
    torch.manual_seed(0)
    model = Language()
    for granularity in ("filter", "2:4", pu.Block(2, 2)):
        with pytest.raises(ValueError, match=r"\(Conv1D\); exclude mlp.0.weight, proj.weight"):
            pu.prune(model, sparsity=None if granularity == "2:4" else 0.5, granularity=granularity)
    linear = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    for layer, own in ((linear[0], model.mlp[0]), (linear[2], model.proj)):
        layer.weight.data, layer.bias.data = own.weight.detach().t().clone(), own.bias.detach().clone()
    conv = nn.Sequential(model.mlp, model.proj)
    x = torch.randn(16, 8), torch.randint(0, 8, (16,))
    for criterion in ("wanda", "snip", "synflow", "magnitude"):
        ours, theirs = (list(pu.scores(each, criterion, x).values()) for each in (conv, linear))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b.t(), rtol=1e-4, atol=1e-6)
    assert pu.cost(conv, x[0]).macs == pu.cost(linear, x[0]).macs


# --- What is left out ------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_told_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.memory, self.pair = nn.Embedding(50, 4), nn.GRU(4, 4), nn.Bilinear(2, 2, 2)
            self.out = nn.Linear(4, 4)

    model = Net()
    with pytest.warns(pu.LeftOutWarning) as told:
        pu.prune(model, sparsity=0.5)
        pu.prune(model, sparsity=0.6)
    total = 200 + 2 * 48 + 2 * 12 + 8 + 2 + 20
    assert len(told) == 1 and told[0].filename == __file__
    assert str(told[0].message) == (
        f"{304 / total:.0%} of the parameters are weights that are not prunable: Embedding 200 (such as words.weight), "
        "GRU 96 (such as memory.weight_ih_l0), Bilinear 8 (such as pair.weight). pu.prunable(type, 'weight') makes a "
        "type prunable"
    )
    with pytest.warns(pu.LeftOutWarning):
        pu.prune_threshold(Net(), 0.1)
    for kind in (nn.Embedding, nn.Bilinear):
        pu.prunable(kind, "weight")
    pu.prunable(nn.GRU, "weight_*")
    pu.prune(Net(), sparsity=0.5)  # without a warning


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "mobilenet_v1", "timm/resnet10t", "torchvision/vit_b_32"])
def test_ordinary_networks_are_no_news(name):
    with torch.device("meta" if "vit" in name else "cpu"):
        model = pu.models.create(name)
    _left_out.tell_left_out(model)


def test_a_tied_embedding_is_not_pruned_silently():
    model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "lm_head": nn.Linear(4, 9, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    with pytest.warns(pu.LeftOutWarning) as told:
        pu.prune(model, sparsity=0.5)
    assert str(told[0].message) == (
        "lm_head.weight is wte.weight of Embedding too, which is pruned with it; exclude='lm_head' leaves both alone"
    )
    pu.prune(Language(), sparsity=0.9, exclude="lm_head")  # without a warning: somebody has thought of it
    pu.prune(Language(), sparsity=0.9, exclude="wte")


# --- Tied weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", ["lm_head", "lm_head.weight", "wte", "wte.weight", "w*"])
def test_every_name_of_a_tied_weight_excludes_it(exclude):
    assert list(pu.prunable_weights(Language(), exclude)) == ["mlp.0.weight", "proj.weight"]
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    assert list(pu.prunable_weights(tied, "b")) == list(pu.prunable_weights(tied, "a")) == ["c.weight"]


def test_tied_models_are_priced_scored_and_saved_once(tmp_path):
    model = Language()
    with pytest.warns(pu.LeftOutWarning):
        pu.prune(model, sparsity=0.5)
    price = pu.cost(model, TOKENS)
    assert price.parameters == 160 + 2 * 256 + 40 and price.macs == 6 * (160 + 2 * 256 + 40 - 40) + price.bias_macs
    path = pu.save(model, tmp_path / "m.safetensors")
    again = pu.load(path, Language())
    assert again.lm_head.weight is again.wte.weight and torch.equal(again(TOKENS), model(TOKENS))
    assert path.stat().st_size < 4 * price.parameters + 2000
    assert not any(mask.any() for mask in pu.dead_weights(Language(), TOKENS).values())
    with pytest.raises(ValueError, match="looked up in an embedding"):
        pu.scores(model, "synflow", TOKENS)


# --- Computed weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
     lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.5)],
)  # fmt: skip
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "synflow", "wanda"])
def test_parametrized_layers_block_only_when_they_are_to_be_pruned(wrap, criterion, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), wrap(nn.Linear(4, 3)))
    data, state = (torch.randn(8, 4), torch.randint(0, 3, (8,))), copy.deepcopy(model.state_dict())
    message = "2.weight is computed by a parametrization.*exclude '2', remove the parametrization first"
    for call in (pu.prune, lambda *args, **options: pu.prune_threshold(model, 0.1, **options)):
        with pytest.raises(ValueError, match=message):
            call(model, criterion=criterion, **({"sparsity": 0.5} if call is pu.prune else {}), data=data)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    masks = pu.prune(model, criterion, 0.5, data=data, exclude="2")
    assert list(masks) == ["0.weight"] and masks.kept == pu.count(model).kept == 8
    assert pu.layer_table(model)["layer"].tolist() == ["0"] and pu.cost(model, data[0]).kept == 8
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    assert pu.count(model).kept == 8
    pu.make_permanent(model)
    with pytest.raises(ValueError, match="2.weight is computed by a parametrization"):
        pu.prune(model[2:], sparsity=0.5)
    only = nn.Sequential(wrap(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="0.weight is computed by a parametrization"):
        pu.count(only)


def test_masks_of_torch_are_taken_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    torch_prune.global_unstructured([(model[0], "weight"), (model[3], "weight")], torch_prune.L1Unstructured, amount=50)
    torch_prune.ln_structured(model[0], "weight", 1, n=2, dim=0)
    masks = {"0.weight": model[0].weight_mask.bool().clone(), "3.weight": model[3].weight_mask.bool().clone()}
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    outputs, parameters = model(x), [model[0].weight_orig, model[3].weight_orig]
    found = pu.take_over(model)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    assert model[0].weight is parameters[0] and model[3].weight is parameters[1]
    assert torch.equal(model(x), outputs) and model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert not torch.equal(model(x), outputs)


def test_what_cannot_be_taken_over_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="torch.nn.utils.prune has pruned nothing in Sequential"):
        pu.take_over(model)
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "bias", 0.5)
    with pytest.raises(
        ValueError, match="0.bias is pruned by torch.nn.utils.prune, and bias of Linear is not prunable"
    ):
        pu.take_over(model)
    assert torch_prune.is_pruned(model[0]) and "weight_orig" in model[0]._parameters
    pu.prunable(nn.Linear, "weight", "bias")
    assert set(pu.take_over(model)) == {"0.weight", "0.bias"} and not torch_prune.is_pruned(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    torch_prune.l1_unstructured(tied[0], "weight", 0.5)
    with pytest.raises(ValueError, match="0.weight is shared with another layer"):
        pu.take_over(tied)
    odd = nn.Sequential(nn.Linear(4, 4))
    torch_prune.custom_from_mask(odd[0], "weight", torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match="0.weight: its mask holds numbers other than 0 and 1"):
        pu.take_over(odd)


# --- Edge cases ------------------------------------------------------------------------------------------------------


def test_natural_zeros_are_not_pruned_weights():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight[:3] = 0
    dense = pu.count(model)  # without masks, zeros may be all that is left of a pruning
    assert (dense.pruned, dense.unmasked_zeros) == (40, 40)
    assert repr(dense) == "Count(160 of 200 kept, 40 pruned, sparsity 0.2000, 40 zeros without a mask)"
    with pytest.warns(pu.TiedScoresWarning):
        pu.prune(model, sparsity=0.05, exclude="1")
    one = pu.count(model)
    assert (one.pruned, one.kept, one.unmasked_zeros) == (5, 195, 35)
    assert pu.layer_table(model)["kept"].tolist() == [95, 100]
    pu.prune(model, sparsity=0.5)
    assert pu.count(model).unmasked_zeros == 0 and "zeros" not in repr(pu.count(model))
    with torch.no_grad():
        model[1].weight[pu.get_masks(model)["1.weight"]] = 0
    assert (pu.count(model).pruned, pu.count(model).unmasked_zeros) == (100, int(pu.get_masks(model)["1.weight"].sum()))
    zeros = sum(int((layer.weight == 0).sum()) for layer in model)
    permanent = pu.count(pu.make_permanent(model))
    assert (permanent.pruned, permanent.unmasked_zeros) == (zeros, zeros)


def test_what_whole_numbers_mean_is_said():
    model = nn.Sequential(nn.Linear(10, 10))
    for sparsity, argument in ((50, "sparsity"), ({"0": 50}, "sparsity of '0'")):
        message = f"^{argument} must be a fraction in .0, 1., not 50; 50 / 100 prunes 50 of the 100 prunable weights"
        with pytest.raises(ValueError, match=message):
            pu.prune(model, "magnitude", sparsity)
    assert pu.prune(model, "magnitude", 0).kept == 100
    with pytest.raises(UserWarning, match="^sparsity is 1, which prunes all weights, as 1.0 does; 1 / 100 prunes 1 of"):
        pu.prune(model, "magnitude", 1)  # warnings are errors here, and come before anything is changed
    assert pu.count(model).kept == 100
    with pytest.warns(pu.LayerCollapseWarning), pytest.warns(UserWarning, match="sparsity is 1, which") as told:
        assert pu.prune(model, "magnitude", 1).kept == 0
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.LayerCollapseWarning)
        pu.prune(model, "magnitude", 1.0)  # nothing to say about 1.0 itself


def test_a_layer_that_is_the_model_has_a_name():
    layer = nn.Linear(4, 3)
    assert (
        pu.layer_table(layer)["layer"].tolist()
        == pu.cost_table(layer, torch.zeros(1, 4))["layer"].tolist()
        == ["weight"]
    )
    with pytest.warns(pu.LayerCollapseWarning, match="1 of 1 layers have no weight left: weight. Less"):
        pu.prune(layer, sparsity=1.0)
    with pytest.raises(ValueError, match="^weight: 12 of 12 weights are pruned already"):
        pu.prune(layer, sparsity=0.5)
    layer.weight.data[0, 0] = 1
    with pytest.warns(pu.RevivedWeightsWarning, match=r"\(weight: 1\)"):
        pu.count(layer)
    with pytest.raises(ValueError, match="no prunable layer fits 'wieght'; did you mean 'weight'"):
        pu.prune(layer, sparsity=1.0, exclude="wieght")


def test_depthwise_layers_are_left_out_of_n_of_m_with_a_note():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)
    )
    with pytest.warns(pu.LeftOutWarning, match="^2:4 leaves out 1 depthwise layers, which have one input.*: 1$"):
        masks = pu.prune(model, granularity="2:4")
    assert list(masks) == ["0.weight", "2.weight", "3.weight"] and masks.sparsity == 0.5
    pu.prune(copy.deepcopy(model), granularity="2:4", exclude="1")  # nothing to tell
    with pytest.raises(ValueError, match=r"inputs in multiples of 4; exclude 0.weight \(3 inputs\)"):
        pu.prune(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), granularity="2:4")
    with pytest.raises(ValueError, match=r"exclude 0.weight \(1 inputs\)"):
        pu.prune(nn.Sequential(nn.Conv2d(8, 8, 1, groups=8)), granularity="2:4")


def test_real_conv1d_of_transformers():
    pytest.importorskip("transformers")
    _torchvision.load()  # which transformers imports
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    names = list(pu.prunable_weights(model))
    assert (
        len(names) == 2 * 4 + 1 and names[0] == "transformer.h.0.attn.c_attn.weight" and names[-1] == "lm_head.weight"
    )
    with pytest.warns(pu.LeftOutWarning, match="lm_head.weight is transformer.wte.weight of Embedding too"):
        pu.prune(model, sparsity=0.9, scope="layer")
    assert pu.count(model).sparsity == pytest.approx(0.9, abs=1e-3) and (model.lm_head.weight == 0).any()
    assert list(pu.prunable_weights(model, "transformer.wte")) == names[:-1]
