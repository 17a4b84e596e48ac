"""What differs between data for fine-tuning and data for preference training."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loftq.train.data.counts import Tally
from loftq.train.data.encode import Encoded, Encoder
from loftq.train.data.formats import Format
from loftq.train.data.pairs import Pair, PairEncoder
from loftq.train.data.problems import BadRow, DataError
from loftq.train.data.settings import DataSettings
from loftq.train.data.show import HeldOut, RenderedExample, decoded, rendered
from loftq.train.data.special import Special

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


class Kind(ABC, Generic[Item]):
    """How samples become items, and items a data set."""

    @abstractmethod
    def encoder(
        self,
        tokenizer: Any,
        special: Special,
        settings: DataSettings,
        max_length: int,
        format: Format,
        tally: Tally,
    ) -> Callable[[Sequence[Any]], Iterator[Item | BadRow]]:
        """From a batch of (place, sample) to items."""

    @abstractmethod
    def dataset(self, items: Sequence[Item]) -> Dataset:
        """The columns that the trainer of this kind takes."""

    @abstractmethod
    def size(self, item: Item) -> tuple[int, int]:
        """Tokens, and those of them that are trained."""

    @abstractmethod
    def key(self, item: Item) -> bytes:
        """The same bytes for the same content."""

    @abstractmethod
    def example(self, tokenizer: Any, item: Item) -> RenderedExample:
        """An item as text."""

    @abstractmethod
    def held_out(self, tokenizer: Any, item: Item) -> HeldOut:
        """An item as a prompt with its reference."""


class Tuning(Kind[Encoded]):
    """Sequences with a loss mask, for SFTTrainer with completion_only_loss=True."""

    def encoder(
        self,
        tokenizer: Any,
        special: Special,
        settings: DataSettings,
        max_length: int,
        format: Format,
        tally: Tally,
    ) -> Encoder:
        chosen = settings.completion_only
        return Encoder(
            tokenizer,
            special,
            max_length,
            completion_only=format.completion_only if chosen is None else chosen,
            cut=settings.truncation == "cut",
            tally=tally,
        )

    def dataset(self, items: Sequence[Encoded]) -> Dataset:
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        offsets = array("q", [0])
        for item in items:
            offsets.append(offsets[-1] + len(item.ids))
        ids, mask = bytearray(), bytearray()
        for item in items:
            ids += item.ids.tobytes()
            mask += item.mask
        columns = {
            "input_ids": (pa.int32(), ids),
            "completion_mask": (pa.int8(), mask),
        }
        lists = {
            name: pa.LargeListArray.from_arrays(
                pa.array(offsets, pa.int64()),
                pa.Array.from_buffers(kind, offsets[-1], [None, pa.py_buffer(data)]),
            )
            for name, (kind, data) in columns.items()
        }
        return Dataset(InMemoryTable(pa.table(lists)))

    def size(self, item: Encoded) -> tuple[int, int]:
        return len(item.ids), item.mask.count(1)

    def key(self, item: Encoded) -> bytes:
        return item.ids.tobytes()

    def example(self, tokenizer: Any, item: Encoded) -> RenderedExample:
        return rendered(tokenizer, item.ids.tolist(), item.mask)

    def held_out(self, tokenizer: Any, item: Encoded) -> HeldOut:
        """The prompt is all before the last answer; of plain text, its beginning."""
        ids = item.ids.tolist()
        start = max(1, item.answer)
        end = next((n for n in range(start, len(ids)) if not item.mask[n]), len(ids))
        return _held_out(tokenizer, ids[:start], ids[start:end])


class Choosing(Kind[Pair]):
    """Prompts with a better and a worse answer, for DPOTrainer, which encodes them itself."""

    def encoder(
        self,
        tokenizer: Any,
        special: Special,
        settings: DataSettings,
        max_length: int,
        format: Format,
        tally: Tally,
    ) -> PairEncoder:
        return PairEncoder(
            tokenizer, special, max_length, cut=settings.truncation == "cut", tally=tally
        )

    def dataset(self, items: Sequence[Pair]) -> Dataset:
        from datasets import Dataset

        if len({isinstance(item.columns["prompt"], str) for item in items}) > 1:
            raise DataError(
                "some preferences are text and others messages. Write all of them in one way, or "
                "split the data."
            )
        return Dataset.from_list([item.columns for item in items])

    def size(self, item: Pair) -> tuple[int, int]:
        return item.tokens, item.trained_tokens

    def key(self, item: Pair) -> bytes:
        return json.dumps(item.columns, sort_keys=True).encode()

    def example(self, tokenizer: Any, item: Pair) -> RenderedExample:
        """With the better answer."""
        mask = [0] * len(item.prompt) + [1] * len(item.chosen)
        return rendered(tokenizer, [*item.prompt, *item.chosen], mask)

    def held_out(self, tokenizer: Any, item: Pair) -> HeldOut:
        return _held_out(tokenizer, item.prompt, item.chosen)


def _held_out(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> HeldOut:
    return HeldOut(
        tuple(prompt),
        decoded(tokenizer, prompt, skip_special_tokens=True).strip(),
        decoded(tokenizer, answer, skip_special_tokens=True).strip(),
    )


KINDS: Mapping[str, Kind[Any]] = {"sft": Tuning(), "preference": Choosing()}
"""By the `kind` of a format."""
