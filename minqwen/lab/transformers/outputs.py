"""What a call returns: attributes and entries of one object, as transformers' `ModelOutput` is."""

from __future__ import annotations

from typing import Any, ClassVar


class ModelOutput(dict[str, Any]):
    """`out.logits`, `out["logits"]`, and by number the entries that are there: `out[0]`, `out[:2]`.

    An attribute of `fields` that was not asked for is None, and no entry.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **entries: Any):
        super().__init__({name: x for name, x in entries.items() if x is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self.fields:
            return None
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}, only {', '.join(self.fields)}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries that are there, in the order of `fields`."""
        return tuple(self.values())


class CausalLMOutput(ModelOutput):
    """Of a forward pass. There is never a cache in it."""

    fields = ("loss", "logits", "past_key_values", "cache", "hidden_states", "attentions")


class GenerateOutput(ModelOutput):
    """Of `generate` with return_dict_in_generate."""

    fields = ("sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values")
