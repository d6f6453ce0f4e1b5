"""Several processes: shares of the work, sums over them, and weights spread over them (FSDP, PyTorch's own).

    accelerate launch --num_processes 8 train.py ...                  # each plays and learns a share, weights whole
    torchrun --nproc_per_node 8 train.py ... --shard                  # weights, gradients, moments spread as well

All processes hold the same batch, whose weights are those of the whole; each computes its micro-batches, and gradients
and statistics are added up. `accelerator` is accelerate's Accelerator, or None where one process works alone.

Spread weights (`--shard`): every process keeps one share of each tensor; a decoder layer's weights are put together when
it computes, and taken apart again (Rajbhandari et al. 2020, ZeRO stage 3). Three things follow:

* the whole pass over a micro-batch must go through the model's hooks: `through_root`;
* all processes must compute the same number of micro-batches, since they wait for one another's shares: `own_share`
  fills up with blanks;
* who wants whole tensors (the sampling engine, a checkpoint) must gather them, on all processes together: `whole`.
"""

import functools
import math
import types

import torch


def own_share(micro_batches, accelerator, even=False):
    """[(micro-batch, True), ...]: those that this process computes; the longest come first, so all get about the same work.

    even: all processes get the same number. What fills up is another's, marked False: to be computed, and not counted.
    """
    if accelerator is None:
        return [(micro, True) for micro in micro_batches]
    mine = [(micro, True) for micro in micro_batches[accelerator.process_index::accelerator.num_processes]]
    rounds = -(-len(micro_batches) // accelerator.num_processes)
    return mine + [(micro_batches[-1], False)] * (rounds - len(mine)) if even else mine


def add_up(accelerator, parameters, *tables):
    """Sum gradients, and dictionaries of numbers, over all processes. In place; returns the tables.

    A sharded parameter's gradients have been summed on the way."""
    if accelerator is None:
        return tables
    from accelerate.utils import gather_object
    for parameter in parameters:
        if not hasattr(parameter, "full_tensor"):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, reduction="sum")
    gathered = gather_object([tables])
    return [{name: sum(one[i].get(name, 0) for one in gathered) for name in sorted({n for one in gathered for n in one[i]})}
            for i in range(len(tables))]


def clip_gradients(parameters, max_norm):
    """As torch.nn.utils.clip_grad_norm_, where some of the parameters may be sharded and others not. Returns the norm."""
    sharded = [p for p in parameters if hasattr(p, "full_tensor")]
    if not sharded:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    rest = [p.grad for p in parameters if not hasattr(p, "full_tensor") and p.grad is not None]
    parts = [torch.nn.utils.get_total_norm([p.grad for p in sharded]).full_tensor(), torch.nn.utils.get_total_norm(rest)]
    norm = math.hypot(*map(float, parts))
    for p in parameters:
        if p.grad is not None and norm > max_norm:
            p.grad.mul_(max_norm / (norm + 1e-6))
    return norm


# ------------------------------------------------------------------------------------------- weights spread over them

def shard(model, half=False):
    """Spread a model over all processes, in place. half: compute in bfloat16, keep and add up in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    units = list(model.get_decoder().layers) if hasattr(model, "get_decoder") else []
    for unit in [*units, model]:  # the last holds what is left: embeddings and output layer, tied or not
        fully_shard(unit, mp_policy=precision, reshard_after_forward=True)
    for unit in [*units, model]:
        unit.set_gradient_divide_factor(1.0)  # add up over the processes: the losses' weights are those of the whole batch
        unit.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model):
    from torch.distributed.fsdp import FSDPModule
    return isinstance(model, FSDPModule)


def through_root(function):
    """Decorator for function(model, ...): on a sharded model it runs as the model's forward pass does, with the weights
    that belong to no layer put together before it and the gradients taken care of after it."""
    @functools.wraps(function)
    def call(model, *args, **keywords):
        if not is_sharded(model):
            return function(model, *args, **keywords)
        name = f"sharded_{function.__name__}"
        if not hasattr(model, name):
            from torch.distributed.fsdp import register_fsdp_forward_method
            setattr(model, name, types.MethodType(function, model))
            register_fsdp_forward_method(model, name)
        return getattr(model, name)(*args, **keywords)
    return call


def whole(state):
    """A state dictionary (nested, of a model or an optimizer) with every tensor put together. All processes must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor().cpu() if hasattr(state, "full_tensor") else state


def load_weights(model, state, strict=True):
    """`model.load_state_dict(state)` for whole tensors, whether or not the model is sharded."""
    if not is_sharded(model):
        return model.load_state_dict(state, strict=strict)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    return set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))


def load_optimizer(optimizer, state):
    """`optimizer.load_state_dict(state)` for whole tensors: each process takes its share, as its parameters are shared."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        if isinstance(parameters[i], DTensor):
            for name, value in moments.items():
                if value.dim():  # the count of steps is a number
                    moments[name] = distribute_tensor(value, parameters[i].device_mesh, parameters[i].placements)
    optimizer.load_state_dict(state)
