"""Operators of Zebra: ``zebra.ops.NAME`` is the documented form of ``torch.ops.zebra.NAME``."""
