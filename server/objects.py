"""What does one of our messages look like to Flower? Ordinary content, cut into objects named by their SHA-256.

A message is a `RecordDict` with a `ConfigRecord` named "document" (the signed document, the payload's size, and the
order of its pieces) and, when there is a payload, an `ArrayRecord` named "payload" with one flat array of bytes,
kept as `ArrayChunk` objects of at most 5 MB. A reader needs the `ConfigRecord` and the chunks only.

`client/objects.py` and `server/objects.py` are the same file: neither side may import the other, and a test keeps
them equal and true to Flower's own classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.recorddict_pb2 import ConfigRecord, ConfigRecordValue, SintList

KINDS = (
    "offer",
    "open",
    "keys",
    "shares",
    "seal",
    "train",
    "validate",
    "test",
    "survivors",
    "unmask",
    "witness",
    "deliver",
)
PIECE = 5 << 20
MAX_DOCUMENT = 1 << 20
MAX_PIECES = 1 << 14


@dataclass(frozen=True)
class Content:
    """A message's content without the payload's bytes: `small` are its objects, parents after their children."""

    small: tuple[tuple[str, bytes], ...]
    tree: ObjectTree


@dataclass(frozen=True)
class Opened:
    """What a received message holds: `pieces` are the names of the payload's chunks in order."""

    kind: str
    document: bytes
    size: int
    pieces: tuple[str, ...]


def content(document: bytes, size: int, pieces: list[str]) -> Content:
    """The content of a message: `document`, and a payload of `size` bytes in chunks named `pieces`, in order."""
    unique = list(dict.fromkeys(pieces))
    index = {object_id: place for place, object_id in enumerate(unique)}
    order = [index[object_id] for object_id in pieces]
    values = {
        "document": ConfigRecordValue(bytes=document),
        "size": ConfigRecordValue(sint64=size),
        "pieces": ConfigRecordValue(sint_list=SintList(vals=order)),
    }
    items = [ConfigRecord.Item(key=key, value=value) for key, value in values.items()]
    objects = [_named("ConfigRecord", [], ConfigRecord(items=items).SerializeToString())]
    trees = [ObjectTree(object_id=objects[0][0])]
    names = {"document": objects[0][0]}
    if pieces:
        facts = {"dtype": "uint8", "shape": [size], "stype": "consilium.bytes", "arraychunk_ids": order}
        objects.append(_named("Array", unique, json.dumps(facts).encode()))
        chunks = ObjectTree(object_id=objects[-1][0], children=[ObjectTree(object_id=one) for one in unique])
        objects.append(_named("ArrayRecord", [chunks.object_id], json.dumps({"payload": chunks.object_id}).encode()))
        trees.append(ObjectTree(object_id=objects[-1][0], children=[chunks]))
        names["payload"] = objects[-1][0]
    objects.append(_named("RecordDict", list(names.values()), json.dumps(names).encode()))
    return Content(tuple(objects), ObjectTree(object_id=objects[-1][0], children=trees))


def message(metadata: Metadata, inside: Content) -> tuple[str, bytes, ObjectTree]:
    """Name, bytes and tree of the message object with this content; the name is not part of `metadata`."""
    body = Message(metadata=metadata).SerializeToString(deterministic=True)
    name, data = _named("Message", [inside.tree.object_id], body)
    return name, data, ObjectTree(object_id=name, children=[inside.tree])


def document_name(tree: ObjectTree) -> str:
    """Which object of a received message to fetch first.

    Raises:
        ValueError: this is not one of our messages.
    """
    if len(tree.children) != 1 or not tree.children[0].children:
        raise ValueError("the message has no content")
    return str(tree.children[0].children[0].object_id)


def opened(message_type: str, tree: ObjectTree, head: bytes) -> Opened:
    """Read a message from its type, its tree, and the bytes of the object `document_name` names.

    Raises:
        ValueError: this is not one of our messages.
    """
    values = {item.key: item.value for item in ConfigRecord.FromString(body(head, "ConfigRecord")).items}
    if values.keys() != {"document", "size", "pieces"}:
        raise ValueError("the document's record has other fields")
    document, size = values["document"].bytes, values["size"].sint64
    order = values["pieces"].sint_list.vals
    records = tree.children[0].children
    arrays = list(records[1].children) if len(records) == 2 else []
    chunks = [chunk.object_id for chunk in arrays[0].children] if len(arrays) == 1 else []
    kind = message_type.removeprefix("query.")
    if kind not in KINDS or not 0 < len(document) <= MAX_DOCUMENT:
        raise ValueError("not a message of a known kind with a document")
    if len(order) > MAX_PIECES or not 0 <= size <= len(order) * PIECE:
        raise ValueError("the payload's size is not possible")
    if any(not 0 <= index < len(chunks) for index in order):
        raise ValueError("a piece of the payload is missing")
    return Opened(kind, document, size, tuple(chunks[index] for index in order))


def _object(kind: str, children: list[str], body: bytes) -> bytes:
    """The bytes of one Flower object: kind, names of its children, length, body."""
    return b"".join((f"{kind} {','.join(children)} {len(body)}".encode(), b"\0", body))


def _named(kind: str, children: list[str], body: bytes) -> tuple[str, bytes]:
    content = _object(kind, children, body)
    return hashlib.sha256(content).hexdigest(), content


def piece_id(data: bytes) -> str:
    """The name of the chunk object with these bytes, without copying them."""
    name = hashlib.sha256(f"ArrayChunk  {len(data)}".encode() + b"\0")
    name.update(data)
    return name.hexdigest()


def body(content: bytes, kind: str) -> bytes:
    """The body of an object that must be of this kind.

    Raises:
        ValueError: it is not.
    """
    head, divider, body = content.partition(b"\0")
    if not divider or head.split(b" ", 1)[0] != kind.encode():
        raise ValueError(f"not an object of kind {kind}")
    return body


def spans(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of each chunk of a payload of `size` bytes."""
    return ((offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE))
