"""A reader of pickles that executes nothing: a stack machine over the opcodes that torch.save writes.

It is not a subclass of `pickle.Unpickler`: nothing is imported, no class is looked up, no object of a foreign type is
made, and the only functions that it calls are those of `_inert_values`. Every opcode that is not needed for tensors and
plain values is refused. Nothing here recurses over values, so their depth costs nothing, and dictionaries are lists of
pairs, so that no key is hashed. Opcodes: `Lib/pickletools.py` of CPython 3.13, protocols 2 to 5.
"""

import struct
from typing import Final

from loraformat.containers._inert_values import Elements, Entries, Value
from loraformat.containers._pickle_machine import Actions, Machine
from loraformat.errors import refuse
from loraformat.limits import MAX_PICKLE_BYTES

_I32: Final = struct.Struct("<i")
_U8, _U16, _U32, _U64 = (struct.Struct(f"<{letter}") for letter in "BHIQ")
_F64: Final = struct.Struct(">d")

ACTIONS: Final[Actions] = {
    0x95: (Machine.take_number, (_U64,)),  # The length of a frame, a hint for reading ahead.
    ord("("): (Machine.mark, ()),
    ord("0"): (Machine.discard, ()),
    ord("1"): (Machine.discard_marked, ()),
    ord("q"): (Machine.remember, (_U8,)),
    ord("r"): (Machine.remember, (_U32,)),
    0x94: (Machine.remember, ()),
    ord("h"): (Machine.recall, (_U8,)),
    ord("j"): (Machine.recall, (_U32,)),
    ord("N"): (Machine.push, (None,)),
    0x88: (Machine.push, (True,)),
    0x89: (Machine.push, (False,)),
    ord(")"): (Machine.push, ((),)),
    ord("]"): (Machine.push_new, (list,)),
    ord("}"): (Machine.push_new, (Entries,)),
    0x8F: (Machine.push_new, (Elements,)),
    ord("K"): (Machine.push_number, (_U8,)),
    ord("M"): (Machine.push_number, (_U16,)),
    ord("J"): (Machine.push_number, (_I32,)),
    ord("G"): (Machine.push_number, (_F64,)),
    0x8A: (Machine.push_long, (_U8,)),
    0x8B: (Machine.push_long, (_I32,)),
    ord("C"): (Machine.push_bytes, (_U8,)),
    ord("B"): (Machine.push_bytes, (_U32,)),
    0x8E: (Machine.push_bytes, (_U64,)),
    0x96: (Machine.push_bytes, (_U64,)),
    0x8C: (Machine.push_text, (_U8,)),
    ord("X"): (Machine.push_text, (_U32,)),
    0x8D: (Machine.push_text, (_U64,)),
    0x85: (Machine.push_tuple, (1,)),
    0x86: (Machine.push_tuple, (2,)),
    0x87: (Machine.push_tuple, (3,)),
    ord("t"): (Machine.push_tuple, ()),
    0x91: (Machine.push_frozenset, ()),
    ord("a"): (Machine.extend, (1,)),
    ord("e"): (Machine.extend, ()),
    0x90: (Machine.add, ()),
    ord("s"): (Machine.set_items, (2,)),
    ord("u"): (Machine.set_items, ()),
    ord("c"): (Machine.push_global, ()),
    0x93: (Machine.push_stack_global, ()),
    ord("R"): (Machine.reduce, ()),
    ord("Q"): (Machine.push_storage, ()),
    ord("b"): (Machine.build, ()),
}


def read_pickle(data: bytes, where: str) -> Value:
    """Return the value that `data` builds.

    Args:
        data: the whole pickle.
        where: for messages.

    Raises:
        InputError: LF123 it is damaged.
        RefusedError: LF901 it asks for code, LF110 it is beyond a limit.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise refuse("LF110", where, f"a pickle of {len(data)} bytes", f"at most {MAX_PICKLE_BYTES}")
    return Machine(data, where).run(ACTIONS)
