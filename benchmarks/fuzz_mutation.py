"""Mutation of messages and files, by what they consist of: so that most of what is made still parses.

A message is changed field by field, as its protobuf descriptor says: numbers to their extremes, enums to what
there is not, repeated fields dropped, doubled, swapped and grown, parts replaced by parts of other messages
of the same type (the *corpus*: real exchanges), tensors given other dtypes, shapes and special floats. A
smaller share is damaged as bytes. Everything follows from the random generator that is given.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from benchmarks.fuzz_bytes import MOST_ELEMENTS, damaged, put_float, text_mutant
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

Corpus = Mapping[str, Sequence[Message]]  # by the full name of the message's type

INTEGERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 511, 512, 513, 65535, 1 << 20)
BITS = {
    FieldDescriptor.TYPE_UINT32: 32,
    FieldDescriptor.TYPE_UINT64: 64,
}
ITEM_BYTES = {
    pb.DTYPE_FLOAT32: 4,
    pb.DTYPE_FLOAT16: 2,
    pb.DTYPE_BFLOAT16: 2,
    pb.DTYPE_FLOAT64: 8,
    pb.DTYPE_INT8: 1,
}
SHARE_OF_BYTES = 0.3  # of the messages, damaged as bytes


def is_message(kind: type[Message], raw: bytes) -> bool:
    """Whether bytes parse as a message of this type."""
    try:
        kind.FromString(raw)
    except DecodeError:
        return False
    return True


class Mutator:
    """Makes mutants of messages.

    Parameters
    ----------
    rng
        Decides everything.
    corpus
        Parts to put in the place of others.
    """

    def __init__(self, rng: random.Random, corpus: Corpus) -> None:
        self.rng, self.corpus = rng, corpus

    def __call__(self, message: Message) -> bytes:
        """Return a mutant of ``message`` as bytes; the message itself stays as it is."""
        rng = self.rng
        if rng.random() < SHARE_OF_BYTES:
            return damaged(rng, message.SerializeToString())
        mutant = type(message)()
        mutant.CopyFrom(message)
        for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 6))):
            self._change(mutant)
        raw = mutant.SerializeToString()
        if rng.random() < 0.03:  # a second one behind it: protobuf merges them
            raw += self._other(message).SerializeToString()
        return raw

    def _other(self, message: Message) -> Message:
        """Return a message of the same type from the corpus, itself if there is none."""
        known = self.corpus.get(message.DESCRIPTOR.full_name)
        return self.rng.choice(known) if known else message

    def _change(self, message: Message) -> None:
        """Change something somewhere inside a message."""
        rng, parent = self.rng, message
        while True:
            if isinstance(parent, pb.Tensor) and rng.random() < 0.5:
                return self._change_tensor(parent)
            held: list[FieldDescriptor] = [field for field, _ in parent.ListFields()]
            every: list[Any] = list(parent.DESCRIPTOR.fields)
            fields: list[FieldDescriptor] = held if held and rng.random() < 0.9 else every
            if not fields:
                return
            field = rng.choice(fields)
            if field.message_type is not None and rng.random() < 0.8:
                inner = getattr(parent, field.name)
                if not field.is_repeated and parent.HasField(field.name):
                    parent = inner
                    continue
                if field.is_repeated and inner:
                    parent = inner[rng.randrange(min(len(inner), 64))]
                    continue
            return self._change_field(parent, field)

    def _change_field(self, parent: Message, field: FieldDescriptor) -> None:
        if field.is_repeated:
            self._change_repeated(parent, field)
        elif field.message_type is not None:
            part: Message = getattr(parent, field.name)
            if self.rng.random() < 0.3:
                parent.ClearField(field.name)
            else:
                part.CopyFrom(self._other(part))
        else:
            setattr(parent, field.name, self._scalar(field, getattr(parent, field.name)))

    def _change_repeated(self, parent: Message, field: FieldDescriptor) -> None:
        rng, name = self.rng, field.name
        items = list(getattr(parent, name)[:MOST_ELEMENTS])
        match rng.randrange(7):
            case 0:
                items = []
            case 1 if items:
                del items[rng.randrange(len(items))]
            case 2 if items:
                items.insert(rng.randrange(len(items) + 1), rng.choice(items))
            case 3 if len(items) > 1:
                one, other = rng.sample(range(len(items)), 2)
                items[one], items[other] = items[other], items[one]
            case 4 if items:
                items = (items * rng.choice((2, 5, 65, MOST_ELEMENTS)))[:MOST_ELEMENTS]
            case 5 if items and field.message_type is None:
                at = rng.randrange(len(items))
                items[at] = self._scalar(field, items[at])
            case _:
                if field.message_type is None:
                    items.append(self._scalar(field, field.default_value or 0))
                else:
                    items.append(
                        rng.choice(self.corpus.get(field.message_type.full_name, ()) or items or [None])
                    )
        if field.message_type is not None:
            items = [type(item).FromString(item.SerializeToString()) for item in items if item is not None]
        parent.ClearField(name)
        getattr(parent, name).extend(items)

    def _scalar(self, field: FieldDescriptor, old: Any) -> Any:
        rng = self.rng
        if field.type == FieldDescriptor.TYPE_BOOL:
            return not old
        if field.type == FieldDescriptor.TYPE_ENUM:
            return rng.choice((*range(8), 100, -1, (1 << 31) - 1, -(1 << 31)))
        if field.type == FieldDescriptor.TYPE_BYTES:
            return damaged(rng, bytes(old))
        if field.type == FieldDescriptor.TYPE_STRING:
            return text_mutant(rng, old)
        top = (1 << BITS[field.type]) - 1
        choices = (top, top - 1, top // 2, top // 2 + 1, old + 1, old - 1, old * 2, rng.choice(INTEGERS))
        return max(0, min(top, rng.choice(choices) if rng.random() < 0.9 else rng.randrange(top)))

    def _change_tensor(self, tensor: pb.Tensor) -> None:
        """Change a tensor so that its dtype, shape and bytes may still fit each other."""
        rng, shape = self.rng, list(tensor.shape)
        item = ITEM_BYTES.get(tensor.dtype, 1)
        match rng.randrange(7):
            case 0:  # special values where numbers were
                data = bytearray(tensor.data)
                for _ in range(rng.choice((1, 3, 50))):
                    put_float(rng, data, item)
                tensor.data = bytes(data)
            case 1 if shape and shape[0]:  # a row more or less, with its bytes
                row = len(tensor.data) // shape[0]
                shape[0] += rng.choice((-1, 1, 2))
                tensor.data = (tensor.data + tensor.data[:row] * 2)[: max(0, row * shape[0])]
                tensor.shape[:] = [max(0, min(shape[0], (1 << 32) - 1)), *shape[1:]]
            case 2:  # the same numbers in another shape
                rng.shuffle(shape)
                tensor.shape[:] = [*shape, *rng.choice(((), (1,), (1, 1)))]
            case 3:  # sizes whose product overflows
                tensor.shape[:] = rng.choice(
                    ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 8, [1 << 31, 2], [0, 0xFFFFFFFF], [1] * 300, [])
                )
            case 4:  # another dtype, with as many bytes as that one takes
                other = rng.choice(list(ITEM_BYTES))
                count = len(tensor.data) // item
                tensor.dtype = other
                tensor.data = (tensor.data * 8)[: count * ITEM_BYTES[other]]
            case 5:
                tensor.scales = rng.choice(
                    (b"", tensor.scales * 2, tensor.scales[:-1], b"\xff" * 12, bytes(4))
                )
            case _:
                tensor.data = tensor.data[: rng.randrange(len(tensor.data) + 1)]


def corpus_of(messages: Sequence[Message], most: int = 60) -> dict[str, list[Message]]:
    """Return messages and all that they consist of, by type: at most ``most`` of each."""
    found: dict[str, list[Message]] = {}

    def add(message: Message) -> None:
        known = found.setdefault(message.DESCRIPTOR.full_name, [])
        if len(known) < most:
            known.append(message)
        for field, value in message.ListFields():
            if field.message_type is not None:
                for part in list(value)[:8] if field.is_repeated else [value]:
                    add(part)

    for message in messages:
        add(message)
    return found
