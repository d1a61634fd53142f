"""What enters and leaves every decoder layer of a causal LM, by hooks: works on any such model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

MIXER_NAMES = ("self_attn", "mla", "mamba")  # the token mixer of a Llama, MLA or Mamba2 layer


def mixer_of(layer: nn.Module) -> nn.Module:
    """Return the token mixer of a decoder layer.

    Raises:
        ValueError: The layer has none under a known name.
    """
    for name in MIXER_NAMES:
        mixer = getattr(layer, name, None)
        if isinstance(mixer, nn.Module):
            return mixer
    raise ValueError(
        f"zebra.distill: a decoder layer must have one of {MIXER_NAMES}, "
        f"got {type(layer).__name__} with {[name for name, _ in layer.named_children()]}"
    )


class LayerTaps:
    """Record the layers of a model's latest forward pass, and optionally feed them.

    ``inputs[l]`` is what layer l was given, ``outputs[l]`` what it returned (the last after the
    final norm, where student and teacher are compared), ``mixers[l]`` what its token mixer returned
    before the residual sum.  While ``feed`` is set, layer l is given ``feed[l]`` instead, so that
    every layer learns on its own.  The hooks stay until :meth:`close`: gradient checkpointing runs
    the layers again during the backward pass and has to see the same inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to ``model.base_model.layers`` and ``.norm``, as in Hugging Face decoders."""
        base: Any = model.base_model
        layers: Sequence[nn.Module] = base.layers
        count = len(layers)
        self.feed: Sequence[Tensor] | None = None
        self.inputs: list[Any] = [None] * count
        self.outputs: list[Any] = [None] * count
        self.mixers: list[Any] = [None] * count
        self._handles: list[Any] = []
        for index, layer in enumerate(layers):
            self._handles += [
                layer.register_forward_pre_hook(self._enter(index), with_kwargs=True),
                mixer_of(layer).register_forward_hook(self._keep(self.mixers, index)),
            ]
            if index < count - 1:
                self._handles.append(layer.register_forward_hook(self._keep(self.outputs, index)))
        self._handles.append(base.norm.register_forward_hook(self._keep(self.outputs, count - 1)))

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            hidden = given if self.feed is None else self.feed[index].to(given.dtype)
            self.inputs[index] = hidden
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    @staticmethod
    def _keep(store: list[Any], index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            store[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LayerTaps:
        """Stay attached for a ``with`` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach at the end of a ``with`` block."""
        self.close()
