"""The invariants of `pruneutils.masks` hold, in whatever order a program prunes, trains, shares and copies."""

import copy
import gc
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import pruneutils as pu
from pruneutils.masks import mask_of

SHAPES = {"a": (4, 4), "b": (4, 4), "c": (6, 4)}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=20.0),  # the decay alone turns signs
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "old school": lambda p: OldSchool(p, {}),
}
seeds = st.integers(0, 2**20)
spots = st.integers(0, 9)  # which of the models, modulo their number


class OldSchool(torch.optim.Optimizer):
    """Writes through `.data`, which autograd does not notice, and keeps state of many types."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data += torch.randn_like(parameter)
                self.state[parameter] = {
                    "bool": torch.ones_like(parameter, dtype=torch.bool),
                    "int": torch.ones_like(parameter, dtype=torch.int64),
                    "half": torch.ones_like(parameter, dtype=torch.bfloat16),
                    "number": 3,
                    "rows": torch.ones(len(parameter)),
                }


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        for name, (n_out, n_in) in SHAPES.items():
            setattr(self, name, nn.Linear(n_in, n_out, bias=False))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self):
        return sum(parameter.sum() for parameter in self.parameters())


class Halves(nn.Module):
    """A parametrization by two other parameters."""

    def forward(self, one, other):
        return one + other

    def right_inverse(self, weight):
        return weight / 2, weight / 2


@dataclass(eq=False)
class Held:
    """What a mask should be."""

    keep: torch.Tensor


@dataclass(eq=False)
class Cell:
    """What a parameter should be."""

    shape: tuple
    mask: Held | None = None


@dataclass(eq=False)
class Slot:
    """A layer: the Cell that it has, and the (Held, Cell) that it holds or held."""

    cell: Cell
    claim: tuple | None = None


@dataclass(eq=False)
class Model:
    net: Net
    slots: dict

    def weight(self, name):
        return getattr(self.net, name).weight

    def outdated(self):
        """Layers whose parameter does not fit its mask, or that of the one before."""
        held = {name: slot.cell.mask or (slot.claim and slot.claim[0]) for name, slot in self.slots.items()}
        return [name for name, mask in held.items() if mask and self.slots[name].cell.shape != tuple(mask.keep.shape)]

    def settle(self):
        """What every call does: masks go to new parameters, and layers hold the masks of their parameters."""
        for slot in self.slots.values():
            if slot.claim and slot.cell.mask is None and slot.cell.shape == tuple(slot.claim[0].keep.shape):
                slot.cell.mask = Held(slot.claim[0].keep)
            if slot.cell.mask:
                slot.claim = slot.cell.mask, slot.cell


class Masked(RuleBasedStateMachine):
    @initialize(seed=seeds)
    def start(self, seed):
        self.models, self.optimizers = [], []
        self.new(seed)

    def take(self, spot):
        return self.models[spot % len(self.models)]

    def others(self, *involved):
        """The weights of all parameters but those of some models, with autograd's counter of changes."""
        mine = {id(slot.cell) for model in involved for slot in model.slots.values()}
        return [
            (model.weight(name), model.weight(name).detach().clone(), model.weight(name)._version)
            for model in self.models
            for name, slot in model.slots.items()
            if id(slot.cell) not in mine
        ]

    def untouched(self, others):
        for weight, before, version in others:
            assert torch.equal(weight, before) and weight._version == version

    # --- What programs do with models ---

    @precondition(lambda self: len(self.models) < 4)
    @rule(seed=seeds)
    def new(self, seed):
        self.models.append(Model(Net(seed), {name: Slot(Cell(shape)) for name, shape in SHAPES.items()}))

    @rule(spot=spots, sparsity=st.sampled_from([0.25, 0.5, 0.75, 1.0]), seed=seeds)
    def prune(self, spot, sparsity, seed):
        model = self.take(spot)
        others, wrong = self.others(model), model.outdated()
        before = [model.weight(name).detach().clone() for name in SHAPES]
        present = {name: slot.cell.mask and slot.cell.mask.keep for name, slot in model.slots.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pu.pruning.LayerCollapseWarning)
                masks = pu.prune(model.net, "random", sparsity, scope="layer", seed=seed)
        except ValueError as error:
            text = str(error)
            assert "has shape" in text or "pruned already" in text
            assert ("has shape" in text) == bool(wrong)
            if wrong:
                assert all(torch.equal(model.weight(n), w) for n, w in zip(SHAPES, before))
            else:
                model.settle()
            self.untouched(others)
            return
        assert not wrong
        model.settle()
        for name in masks:
            keep, slot = masks[name], model.slots[name.removesuffix(".weight")]
            assert int(keep.sum()) == keep.numel() - round(sparsity * keep.numel())
            assert present[name.removesuffix(".weight")] is None or not (keep & ~slot.cell.mask.keep).any()
            slot.cell.mask = slot.cell.mask or Held(keep)
            slot.cell.mask.keep = keep
        model.settle()
        self.untouched(others)

    @rule(spot=spots, name=st.sampled_from(list(SHAPES)), seed=seeds)
    def set_masks(self, spot, name, seed):
        model = self.take(spot)
        slot, others = model.slots[name], self.others(model)
        first = next(n for n, other in model.slots.items() if other.cell is slot.cell)  # shared weights have one name
        keep = torch.rand(slot.cell.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        pu.set_masks(model.net, {f"{first}.weight": keep})
        model.settle()
        slot.cell.mask = slot.cell.mask or Held(keep)
        slot.cell.mask.keep = keep
        model.settle()
        self.untouched(others)

    @rule(spot=spots, kind=st.sampled_from(list(OPTIMIZERS)), fresh=st.booleans(), seed=seeds, bad=st.booleans())
    def step(self, spot, kind, fresh, seed, bad):
        """A step with gradients that nobody has masked, and that may be infinite or NaN where weights are pruned."""
        model = self.take(spot)
        if fresh or not self.optimizers:
            self.optimizers = self.optimizers[-2:] + [OPTIMIZERS[kind](model.net.parameters())]
        optimizer, generator = self.optimizers[spot % len(self.optimizers)], torch.Generator().manual_seed(seed)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            mask = mask_of(parameter)
            if bad and mask is not None and not mask.misfit(parameter):
                extreme = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
                noise = extreme[torch.randint(4, parameter.shape, generator=generator)].to(parameter.dtype)
                parameter.grad = torch.where(mask.keep, parameter.grad, noise)
        stepped = {id(parameter) for parameter in parameters}
        others = [other for other in self.others() if id(other[0]) not in stepped]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            optimizer.step()
        self.untouched(others)

    @rule(spot=spots, times=st.integers(1, 2))
    def backward(self, spot, times):
        model = self.take(spot)
        model.net.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a parameter of shape")
            for _ in range(times):
                model.net().backward()
        for name, slot in model.slots.items():
            mask = mask_of(model.weight(name))
            fits = mask is not None and not mask.misfit(model.weight(name))
            assert torch.equal(model.weight(name).grad != 0, mask.keep if fits else torch.ones(slot.cell.shape) > 0)

    @rule(spot=spots)
    def call_with_other_weights(self, spot):
        model, others = self.take(spot), self.others()
        given = {f"{name}.weight": torch.ones(slot.cell.shape).requires_grad_() for name, slot in model.slots.items()}
        torch.func.functional_call(model.net, given, (), tie_weights=False).backward()
        assert all(weight.grad is None or (weight.grad != 0).all() for weight in given.values())
        self.untouched(others)

    @rule(spot=spots, seed=seeds, assign=st.booleans())
    def load(self, spot, seed, assign):
        model = self.take(spot)
        if model.outdated():
            return
        pu.get_masks(model.net)  # a model that has never been looked at could not know of masks that others gave it
        model.settle()
        others = self.others(model)
        state = {f"{n}.weight": torch.randn(slot.cell.shape) for n, slot in model.slots.items()}
        model.net.load_state_dict(state, assign=assign)
        if assign:
            for slot in model.slots.values():
                slot.cell = Cell(slot.cell.shape)
            model.settle()
        self.untouched(others)

    @rule(one=spots, other=spots, names=st.sampled_from(["aa", "bb", "cc", "ab"]))
    def share_or_tie(self, one, other, names):
        one, other, (name, into) = self.take(one), self.take(other), names
        getattr(other.net, into).weight = one.weight(name)
        other.slots[into].cell = one.slots[name].cell

    @rule(spot=spots, name=st.sampled_from(list(SHAPES)), rows=st.sampled_from([1, 4, 4, 6]))
    def replace(self, spot, name, rows):
        model = self.take(spot)
        getattr(model.net, name).weight = nn.Parameter(torch.randn(rows, 4))
        model.slots[name].cell = Cell((rows, 4))

    @rule(spot=spots, name=st.sampled_from(list(SHAPES)), rows=st.sampled_from([1, 4, 6]))
    def write_data_of_another_shape(self, spot, name, rows):
        model = self.take(spot)
        weight, cell = model.weight(name), model.slots[name].cell
        weight.data, weight.grad, cell.shape = torch.randn(rows, 4).to(weight.dtype), None, (rows, 4)
        if cell.mask and cell.mask.keep.shape == cell.shape:
            weight.data[~cell.mask.keep] = 0
        self.optimizers = [o for o in self.optimizers if weight not in o.state]

    @rule(spot=spots, name=st.sampled_from(list(SHAPES)), kind=st.sampled_from([nn.Identity, Halves]))
    def parametrize(self, spot, name, kind):
        """While a weight is computed, its mask is missed; the parameter that comes back, or a new one, gets it."""
        model = self.take(spot)
        layer, slot = getattr(model.net, name), model.slots[name]
        parametrize.register_parametrization(layer, "weight", kind())
        if slot.claim:
            self.refused(model, "has a mask and no parameter|has shape")
        parametrize.remove_parametrizations(layer, "weight")
        if kind is Halves:
            slot.cell = Cell(slot.cell.shape)

    @rule(spot=spots, seed=seeds)
    def offload(self, spot, seed):
        model, others = self.take(spot), self.others(self.take(spot))
        model.net.to("meta")
        if any(slot.claim for slot in model.slots.values()):
            self.refused(model, "is on the meta device")
        model.net.to_empty(device="cpu")
        for slot in model.slots.values():
            slot.cell = Cell(slot.cell.shape)
        model.net.load_state_dict({f"{n}.weight": torch.randn(slot.cell.shape) for n, slot in model.slots.items()})
        model.settle()
        self.untouched(others)

    def refused(self, model, message):
        for call in (pu.count, pu.get_masks, pu.hold):
            with pytest.raises(ValueError, match=message):
                call(model.net)

    @precondition(lambda self: len(self.models) < 4)
    @rule(spot=spots, way=st.sampled_from(["deepcopy", "pickle", "average"]))
    def copy(self, spot, way):
        model = self.take(spot)
        net = pickle.loads(pickle.dumps(model.net)) if way == "pickle" else copy.deepcopy(model.net)
        if way == "average":
            averaged = AveragedModel(model.net)
            for _ in range(2):
                averaged.update_parameters(model.net)
            net = averaged.module
        cells, held, slots = {}, {}, {}
        for name, slot in model.slots.items():
            cell = cells.setdefault(slot.cell, Cell(slot.cell.shape))
            slots[name] = Slot(cell)
        for name, slot in model.slots.items():
            if slot.claim:
                mask, cell = slot.claim
                mine = held.setdefault(mask, Held(mask.keep))
                if cell in cells:
                    cells[cell].mask = mine
                slots[name].claim = mine, cells.get(cell)
        self.models.append(Model(net, slots))

    @rule(spot=spots, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    def move(self, spot, dtype):
        net = self.take(spot).net.to(dtype)
        moved = {id(parameter) for parameter in net.parameters()}  # torch's optimizers cannot go on in another type
        self.optimizers = [o for o in self.optimizers if not any(id(p) in moved for p in o.state)]

    @precondition(lambda self: len(self.models) > 1)
    @rule(spot=spots)
    def delete(self, spot):
        del self.models[spot % len(self.models)]
        gc.collect(0)

    # --- What the package says ---

    @rule(spot=spots)
    def look(self, spot):
        model = self.take(spot)
        others, wrong = self.others(model), model.outdated()
        if wrong:
            before = [model.weight(name).detach().clone() for name in SHAPES]
            self.refused(model, f"({'|'.join(wrong)}).weight has shape")
            assert all(torch.equal(model.weight(n), w) for n, w in zip(SHAPES, before))
        else:
            count = pu.count(model.net)
            model.settle()
            masks, cells = pu.get_masks(model.net), {}
            for name, slot in model.slots.items():
                if slot.cell not in cells:
                    cells[slot.cell] = name
            named = {f"{name}.weight": cell.mask.keep for cell, name in cells.items() if cell.mask}
            assert masks.keys() == named.keys() and all(torch.equal(masks[n], keep) for n, keep in named.items())
            free = [model.weight(name) for cell, name in cells.items() if not cell.mask]
            # beside masks, zeros that no mask holds are not counted as pruned
            assert count.kept == masks.kept + sum(w.numel() if masks else int(w.count_nonzero()) for w in free)
        self.untouched(others)

    @rule(spot=spots)
    def make_permanent(self, spot):
        model = self.take(spot)
        others = self.others(model)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            pu.make_permanent(model.net)
        model.settle()
        claims = [slot.claim for slot in model.slots.values() if slot.claim]
        for slot in model.slots.values():
            slot.claim = None
        held = {slot.claim[0] for other in self.models for slot in other.slots.values() if slot.claim}
        for mask, cell in claims:
            if mask not in held and cell is not None and cell.mask is mask:
                cell.mask = None
        assert bool(warned) == any(mask in held for mask, _ in claims)
        assert model.net.a.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
        self.untouched(others)

    # --- What holds after each of these ---

    @invariant()
    def every_parameter_has_its_mask_and_exact_zeros(self):
        for model in getattr(self, "models", ()):
            for name, slot in model.slots.items():
                weight, expected = model.weight(name), slot.cell.mask
                mask = mask_of(weight)
                assert (mask is None) == (expected is None), name
                if mask is not None:
                    assert torch.equal(mask.keep, expected.keep)
                    pruned = torch.zeros(0) if mask.misfit(weight) else weight.detach()[~mask.keep]
                    assert not pruned.any() and not torch.signbit(pruned).any()

    @invariant()
    def optimizers_know_nothing_of_pruned_weights(self):
        for optimizer in getattr(self, "optimizers", ()):
            for parameter, state in optimizer.state.items():
                mask = mask_of(parameter)
                for value in state.values() if mask is not None else ():
                    if torch.is_tensor(value) and value.shape == mask.keep.shape:
                        assert not value[~mask.keep].any()

    @invariant()
    def models_are_ordinary(self):
        for model in getattr(self, "models", ()):
            assert list(model.net.state_dict()) == [f"{name}.weight" for name in SHAPES]
            assert all(type(parameter) is nn.Parameter for parameter in model.net.parameters())

    def teardown(self):
        self.models, self.optimizers = [], []


TestMasked = Masked.TestCase
TestMasked.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
