"""The reference of a preference: the UNet as it was before training, or at the start of a round."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sharpening.sdxl import trainable_parameters
from sharpening.sharding import local, part


class Reference:
    """A frozen copy of the UNet or, where an adapter trains, the UNet with its adapter as it was: at first off."""

    def __init__(self, unet: UNet2DConditionModel, frozen: UNet2DConditionModel | None) -> None:
        """`frozen` is the copy; None: the UNet has an adapter."""
        self._unet, self._frozen = unet, frozen
        self._adapter: list[Tensor] = []  # as it was; empty: off

    @contextmanager
    def unet(self) -> Iterator[UNet2DConditionModel]:
        """The reference within, the training weights again outside."""
        if self._frozen is not None:
            yield self._frozen
        elif self._adapter:
            self._swap()
            try:
                yield self._unet
            finally:
                self._swap()
        else:
            self._unet.disable_adapters()
            try:
                yield self._unet
            finally:
                self._unet.enable_adapters()

    def _swap(self) -> None:
        for index, parameter in enumerate(trainable_parameters(self._unet)):
            parameter.data, self._adapter[index] = self._adapter[index], parameter.data

    @torch.no_grad()
    def renew(self) -> None:
        """From now on the reference is the UNet as it is."""
        if self._frozen is None:
            self._adapter = [parameter.detach().clone() for parameter in trainable_parameters(self._unet)]
            return
        for ours, theirs in zip(self._frozen.parameters(), self._unet.parameters(), strict=True):
            local(ours).copy_(local(theirs))

    def state(self) -> list[Tensor]:
        """What `load` restores: the weights of the copy, which may lie in parts, or of the adapter as it was."""
        return self._adapter if self._frozen is None else [parameter.data for parameter in self._frozen.parameters()]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Become the reference that `state`, whole by now, was taken from."""
        if self._frozen is None:
            self._adapter = [tensor.to(self._unet.device) for tensor in state]
            return
        for parameter, tensor in zip(self._frozen.parameters(), state, strict=True):
            parameter.copy_(part(tensor, parameter))
