"""Models too large for one GPU: weights, gradients and Adam's moments spread over the processes (FSDP, PyTorch's own).

    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-32B-Instruct --shard --engine vllm ...

Every process keeps one share of each tensor. A decoder layer's weights are put together when it computes, and taken apart
again (Rajbhandari et al. 2020, ZeRO stage 3). Three things follow, and they are all that this file does:

* the whole pass over a micro-batch must go through the model's hooks: `through_root`;
* all processes must compute the same number of micro-batches, since they wait for one another's shares: `update.own_share`
  fills up with blanks;
* who wants whole tensors (the sampling engine, a checkpoint) must gather them, on all processes together: `whole`.
"""

import functools
import types

import torch


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
