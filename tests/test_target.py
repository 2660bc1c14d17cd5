"""What is prunable: types that a line adds, weights of several layers, and those that are tied or computed."""

import copy
import warnings

import count_stops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pruneutils as pu
from pruneutils import target
from pruneutils.pruning import LayerCollapseWarning, LeftOutWarning
from pruneutils.target import Target


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Every test has a table of its own, and warnings are errors."""
    monkeypatch.setattr(target, "RULES", dict(target.RULES))
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


# --- The house -------------------------------------------------------------------------------------------------------


def test_public_names_exist_and_are_at_most_45():
    assert len(set(pu.__all__)) == len(pu.__all__) <= 45 and all(hasattr(pu, name) for name in pu.__all__)
    with pytest.raises(AttributeError, match="no 'take_over'; it is pu.takeover.take_over"):
        getattr(pu, "take_over")  # noqa: B009
    with pytest.raises(AttributeError, match="no 'pruen'; did you mean 'prune'"):
        getattr(pu, "pruen")  # noqa: B009


def test_the_model_makes_few_stops_on_its_way():
    warnings.simplefilter("ignore")
    for name, stops in count_stops.ways().items():
        assert 0 < len(stops) <= (20 if name.startswith("prune_filters") else 10), (name, stops)


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

    with pytest.raises(ValueError, match="Conv1D has nothing to prune.*pu.prunable"):
        pu.prunable_weights(Conv1D())
    assert Target.of(Conv1D(), strict=False).weights == {}


def test_one_line_adds_a_type_and_subclasses_follow_the_nearest():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2), nn.Embedding(4, 2), Mine(2, 2))
    pu.prunable(nn.Bilinear, "weight")
    pu.prunable(nn.Linear, "weight", "bias")
    assert list(pu.prunable_weights(model)) == ["0.weight", "0.bias", "1.weight", "3.weight", "3.bias"]
    assert list(pu.prunable_weights(model, ["0.bias", "1", "3"])) == ["0.weight"]
    pu.prunable(nn.Linear)
    pu.prunable(Mine, "bias")
    pu.prunable("torch.nn.modules.sparse.Embedding", "w*")
    assert list(pu.prunable_weights(model)) == ["1.weight", "2.weight", "3.bias"]
    for kind in (3, nn.Linear(2, 2), torch.Tensor):
        with pytest.raises(TypeError, match="kind must be a module type or its full name"):
            pu.prunable(kind, "weight")


@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "snip", "grasp", "fisher", "random"])
@pytest.mark.filterwarnings("ignore")
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
    warnings.simplefilter("ignore")
    model, data = Net(), (torch.randint(0, 9, (8, 5)), torch.randint(0, 9, (8,)))
    total = 36 + 4 * 3 * (4 + 3) + 27 + 9
    masks = pu.prune(model, criterion, 0.5, data=data)
    assert masks.total == pu.count(model).total == total and pu.count(model).pruned == round(0.5 * total)
    pu.fit(model, data, epochs=3, optimizer="adam", lr=0.1)
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_names_that_fit_no_layer_are_errors():
    model = nn.ModuleDict({"layer1": nn.Sequential(nn.Linear(2, 2)), "fc": nn.Linear(2, 2), "none": nn.Linear(2, 2)})
    model["none"].weight = nn.Parameter(torch.empty(2, 0))
    assert list(pu.prunable_weights(model)) == ["layer1.0.weight", "fc.weight"]  # one of size zero has no weights
    with pytest.raises(ValueError, match=r"no prunable layer fits 'layer1'; did you mean 'layer1.\*', the layers in"):
        pu.prunable_weights(model, "layer1")
    with pytest.raises(ValueError, match=r"exclude=\['\*'\] leaves nothing to prune"):
        pu.prunable_weights(model, ["*"])
    for exclude, given_value in ((model["fc"], "Linear"), ([3], "3"), (3, "3")):
        with pytest.raises(TypeError, match=f"exclude takes names or globs of layers, .*not {given_value}"):
            pu.prunable_weights(model, exclude)


# --- Weights of several layers ---------------------------------------------------------------------------------------


@given(sparsity=st.floats(0, 1), scope=st.sampled_from(["layer", "erk"]), seed=st.integers(0, 99), again=st.booleans())
@settings(max_examples=40, deadline=None)
def test_queries_keys_and_values_compete_as_three_layers(sparsity, scope, seed, again):
    """The masks are those of a model in which the three are linear layers of their own."""
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(6, 2)
    parts = {label: nn.Linear(6, 6) for label in "qkv"} | {"out": nn.Linear(6, 6)}
    for layer, weight in zip(parts.values(), (*attention.in_proj_weight.chunk(3), attention.out_proj.weight)):
        layer.weight.data.copy_(weight.detach())
    twin = nn.ModuleDict(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        for share in (sparsity / 2, sparsity) if again and scope == "layer" else (sparsity,):
            found = pu.prune(attention, sparsity=share, scope=scope)
            expected = pu.prune(twin, sparsity=share, scope=scope)
    assert torch.equal(found["in_proj_weight"], torch.cat([expected[f"{label}.weight"] for label in "qkv"]))
    assert torch.equal(found["out_proj.weight"], expected["out.weight"])


def test_a_part_has_a_name():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(4, 4)})
    before = model["a"].in_proj_weight.detach().clone()

    def kept(masks):
        return [int(part.sum()) for part in masks["a.in_proj_weight"].chunk(3)]

    masks = pu.prune(model, sparsity={"a": 0.5, "b": 0.25}, iterations=2, restorable=True)
    assert kept(masks) == [8, 8, 8] and masks["b.weight"].sum() == 12
    assert torch.equal(pu.restore(model)["a"].in_proj_weight, before)
    masks = pu.prune(model, sparsity={"a.in_proj_weight[k]": 0.75})
    assert kept(masks) == [16, 4, 16] and len(masks) == 1
    assert kept(pu.prune(model, sparsity={"a.in_proj_weight": 0.75})) == [4, 4, 4]
    with pytest.warns(LayerCollapseWarning, match=r"1 of 3 layers have no weight left: a.in_proj_weight\[q\]"):
        pu.prune(model, lambda model, data: {"a.in_proj_weight": before.abs()}, {"a.in_proj_weight[q]": 1.0})
    whole = Target.of(model)
    tensors = {"a.in_proj_weight": before, "b.weight": model["b"].weight}
    assert all(torch.equal(joined, tensors[name]) for name, joined in whole.join(whole.split(tensors)).items())


def test_transposed_weights_are_pruned_one_by_one():
    torch.manual_seed(0)
    model = Language()
    for granularity in ("filter", "2:4", pu.Block(2, 2)):
        with pytest.raises(ValueError, match=r"of Conv1D; exclude mlp.0.weight, proj.weight"):
            pu.prune(model, sparsity=None if granularity == "2:4" else 0.5, granularity=granularity)
    linear = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    for layer, own in ((linear[0], model.mlp[0]), (linear[2], model.proj)):
        layer.weight.data, layer.bias.data = own.weight.detach().t().clone(), own.bias.detach().clone()
    x = torch.randn(16, 8), torch.randint(0, 8, (16,))
    for criterion in ("wanda", "snip", "synflow", "magnitude"):
        conv = nn.Sequential(model.mlp, model.proj)
        ours, theirs = (list(pu.scores(each, criterion, x).values()) for each in (conv, linear))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b.t(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"granularity": "2:4"}, {"sparsity": 0.5, "scope": "layer"}])
def test_matrices_in_a_stack_are_layers_of_their_own(options):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.bias = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 6))

    pu.prunable(Experts, "up", stack=True)
    model, twin = Experts(), nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
    for layer, matrix in zip(twin, model.up.detach()):
        layer.weight.data.copy_(matrix)
    expected = torch.stack(list(pu.prune(twin, **options).values()))
    assert torch.equal(pu.prune(model, **options)["up"], expected)
    assert pu.prune(model, sparsity={"up[1]": 0.75})["up"].sum((1, 2)).tolist() == [24, 12, 24]


# --- What is unprunable ----------------------------------------------------------------------------------------------


def test_unprunable_matrices_are_reported_once_for_a_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.memory, self.pair = nn.Embedding(50, 4), nn.GRU(4, 4), nn.Bilinear(2, 2, 2)
            self.out = nn.Linear(4, 4)

    model = Net()
    with pytest.warns(LeftOutWarning) as caught:
        pu.prune(model, sparsity=0.5)
        pu.prune(model, sparsity=0.6)
    assert len(caught) == 1 and caught[0].filename == __file__
    kinds = r"Embedding 200 \(such as words.weight\), GRU 96 \(such as memory.weight_ih_l0\), Bilinear 8"
    with pytest.warns(LeftOutWarning, match=f"{304 / (200 + 2 * 48 + 2 * 12 + 8 + 2 + 20):.0%} of the .*{kinds}"):
        pu.prune_threshold(Net(), 0.1)
    for kind in (nn.Embedding, nn.Bilinear):
        pu.prunable(kind, "weight")
    pu.prunable(nn.GRU, "weight_*")
    pu.prune(Net(), sparsity=0.5)  # without a warning


def test_adapters_that_are_pruned_with_their_base_are_named():
    def adapted():
        layers = {"base": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2), "lora_B": nn.Linear(2, 4)}
        return nn.ModuleDict({"q_proj": nn.ModuleDict(layers)})

    with pytest.warns(LeftOutWarning, match=r"2 LoRA adapters .* such as q_proj.lora_A.weight: exclude='\*lora_\*'"):
        pu.prune(adapted(), sparsity=0.5)
    assert list(pu.prune(adapted(), sparsity=0.5, exclude="*lora_*")) == ["q_proj.base.weight"]  # without a warning


def test_models_that_hide_their_weights_are_refused_with_the_reason():
    warnings.simplefilter("ignore")
    for call in (pu.count, pu.prune, pu.prunable_weights):
        with pytest.raises(ValueError, match="is compiled by torch.jit, .*; prune the model before"):
            call(torch.jit.script(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match="has quantized layers only, such as '0'; prune the model before"):
            call(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(2, 2)))
        with pytest.raises(ValueError, match="^0.weight has no shape yet; run the model on a batch"):
            call(nn.Sequential(nn.LazyLinear(2)))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "timm/resnet10t"])
def test_ordinary_networks_are_no_news(name):
    target.warn_unprunable(Target.of(pu.models.create(name)))


@pytest.mark.parametrize("exclude", ["lm_head", "lm_head.weight", "wte", "wte.weight", "w*"])
def test_every_name_of_a_tied_weight_excludes_it(exclude):
    assert list(pu.prunable_weights(Language(), exclude)) == ["mlp.0.weight", "proj.weight"]
    pu.prune(Language(), sparsity=0.9, exclude=exclude)  # without a warning: somebody has thought of it
    with pytest.warns(LeftOutWarning, match="lm_head.weight is wte.weight of Embedding too.*exclude='lm_head' leaves"):
        pu.prune(Language(), sparsity=0.5)


# --- Computed weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, lambda layer: torch_prune.identity(layer, "weight")])
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "synflow", "wanda"])
def test_parametrized_layers_block_only_when_they_are_to_be_pruned(wrap, criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), wrap(nn.Linear(4, 3)))
    data, state = (torch.randn(8, 4), torch.randint(0, 3, (8,))), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="2.weight is computed by a parametrization.*exclude '2', remove the para"):
        pu.prune(model, criterion, sparsity=0.5, data=data)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(pu.scores(model, criterion, data)) == ["0.weight"]
    masks = pu.prune(model, criterion, 0.5, data=data, exclude="2")
    assert list(masks) == ["0.weight"] and masks.kept == pu.count(model).kept == 8
    with pytest.raises(ValueError, match="0.weight is computed by a parametrization"):
        pu.count(nn.Sequential(wrap(nn.Linear(4, 3))))
