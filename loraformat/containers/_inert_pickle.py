"""A reader of pickles that executes nothing: a stack machine over the opcodes that torch.save writes.

It is not a subclass of `pickle.Unpickler`: nothing is imported, no class is looked up, no object of a foreign type is
made, and the only functions that it calls are those of `_inert_values`. Every opcode that is not needed for tensors and
plain values is refused. Nothing here recurses over values, so their depth costs nothing, and dictionaries are lists of
pairs, so that no key is hashed. Opcodes: `Lib/pickletools.py` of CPython 3.13, protocols 2 to 5.
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any, Final, NoReturn

from loraformat.containers._inert_values import (
    Elements,
    Entries,
    Global,
    UnfitArgumentsError,
    Value,
    call,
    find_global,
    make_storage,
)
from loraformat.errors import refuse
from loraformat.limits import (
    MAX_NAME_BYTES,
    MAX_PICKLE_BYTES,
    MAX_PICKLE_INTEGER_BYTES,
    MAX_PICKLE_MARKS,
    MAX_PICKLE_MEMO,
    MAX_PICKLE_OPCODES,
    MAX_PICKLE_STRING_BYTES,
)

_PROTO: Final = 0x80
_STOP: Final = ord(".")
_PROTOCOLS: Final = range(2, 6)
_EXPECTED: Final = "tensors, numbers, text, lists and dictionaries"

_ASK_FOR_CODE: Final = frozenset(b"oiP\x81\x82\x83\x84\x92\x97\x98")
"""Opcodes whose work is to make objects by name, by number or from outside."""


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
    return _Machine(data, where).run()


class _Machine:
    """The state of one reading: stack, memo, and where each collection under construction begins."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._place = 0
        self._stack: list[Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, Value] = {}

    def run(self) -> Value:
        if self._take(1)[0] != _PROTO or self._take(1)[0] not in _PROTOCOLS:
            self._fail(f"the beginning {self._data[:2]!r}", "protocol 2, 3, 4 or 5")
        data, actions = self._data, _ACTIONS
        for _ in range(MAX_PICKLE_OPCODES):
            if self._place >= len(data):
                self._fail("a pickle that is cut off", "an opcode")
            code = data[self._place]
            self._place += 1
            action = actions.get(code)
            if action is not None:
                action[0](self, *action[1])
            elif code == _STOP:
                return self._finish()
            else:
                self._refuse_opcode(code)
        raise refuse("LF110", self._where, "a pickle without end", f"at most {MAX_PICKLE_OPCODES} opcodes")

    def _finish(self) -> Value:
        if len(self._stack) != 1 or self._marks or self._place != len(self._data):
            self._fail(f"{len(self._stack)} values at its end", "one value, and nothing behind it")
        return self._stack[0]

    # --- bytes ---

    def _take(self, count: int) -> bytes:
        end = self._place + count
        if end > len(self._data):
            self._fail("a pickle that is cut off", f"{count} more bytes")
        piece = self._data[self._place : end]
        self._place = end
        return piece

    def take_number(self, form: struct.Struct) -> Value:
        place = self._place
        self._place += form.size
        if self._place > len(self._data):
            self._fail("a pickle that is cut off", f"{form.size} more bytes")
        return form.unpack_from(self._data, place)[0]

    def _take_counted(self, form: struct.Struct, most: int = MAX_PICKLE_STRING_BYTES) -> bytes:
        count: int = self.take_number(form)
        if not 0 <= count <= most:
            raise refuse("LF110", self._where, f"{count} bytes in one value of the pickle", f"at most {most}")
        return self._take(count)

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")  # As Python writes text; names are checked where they are used.
        except UnicodeDecodeError:
            self._fail(f"the text {raw[:40]!r}", "UTF-8")

    def _take_line(self) -> str:
        end = self._data.find(b"\n", self._place, self._place + MAX_NAME_BYTES)
        if end < 0:
            self._fail("a name without end", f"at most {MAX_NAME_BYTES} bytes")
        return self._decode(self._take(end + 1 - self._place)[:-1])

    # --- stack and memo ---

    def _need(self, count: int) -> None:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            self._fail("an empty stack", f"{count} values")

    def _pop(self, count: int) -> tuple[Value, ...]:
        self._need(count)
        return self._cut(len(self._stack) - count)

    def _pop_marked(self) -> tuple[Value, ...]:
        if not self._marks:
            self._fail("no mark", "one")
        return self._cut(self._marks.pop())

    def _cut(self, start: int) -> tuple[Value, ...]:
        values = tuple(self._stack[start:])
        del self._stack[start:]
        return values

    def _top(self) -> Value:
        self._need(1)
        return self._stack[-1]

    def discard(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop(1)

    def discard_marked(self) -> None:
        self._pop_marked()

    def mark(self) -> None:
        if len(self._marks) >= MAX_PICKLE_MARKS:
            found = "collections nested too deeply in the pickle"
            raise refuse("LF110", self._where, found, f"at most {MAX_PICKLE_MARKS} levels")
        self._marks.append(len(self._stack))

    def remember(self, form: struct.Struct | None = None) -> None:
        index = self.take_number(form) if form else len(self._memo)
        if len(self._memo) >= MAX_PICKLE_MEMO:
            raise refuse("LF110", self._where, "too many remembered values", f"at most {MAX_PICKLE_MEMO}")
        self._memo[index] = self._top()

    def recall(self, form: struct.Struct) -> None:
        index = self.take_number(form)
        if index not in self._memo:
            self._fail(f"value {index}, which it has not made", "a value from before")
        self._stack.append(self._memo[index])

    # --- plain values ---

    def push(self, value: Value) -> None:
        self._stack.append(value)

    def push_new(self, kind: Callable[[], Value]) -> None:
        self._stack.append(kind())

    def push_number(self, form: struct.Struct) -> None:
        self._stack.append(self.take_number(form))

    def push_long(self, form: struct.Struct) -> None:
        self._stack.append(int.from_bytes(self._take_counted(form, MAX_PICKLE_INTEGER_BYTES), "little", signed=True))

    def push_bytes(self, form: struct.Struct) -> None:
        self._stack.append(self._take_counted(form))

    def push_text(self, form: struct.Struct) -> None:
        self._stack.append(self._decode(self._take_counted(form)))

    def push_tuple(self, count: int | None = None) -> None:
        self._stack.append(self._pop_marked() if count is None else self._pop(count))

    def push_frozenset(self) -> None:
        self._stack.append(Elements(list(self._pop_marked())))

    def extend(self, count: int | None = None) -> None:
        values, target = self._pop_marked() if count is None else self._pop(count), self._top()
        if type(target) is not list:
            self._fail(f"items for {_name(target)}", "a list")
        target.extend(values)

    def add(self) -> None:
        values, target = self._pop_marked(), self._top()
        if not isinstance(target, Elements):
            self._fail(f"elements for {_name(target)}", "a set")
        target.items.extend(values)

    def set_items(self, count: int | None = None) -> None:
        values, target = self._pop_marked() if count is None else self._pop(count), self._top()
        if not isinstance(target, Entries) or len(values) % 2:
            self._fail(f"{len(values)} keys and values for {_name(target)}", "pairs for a dictionary")
        target.items.extend(zip(values[::2], values[1::2], strict=True))

    # --- what other readers execute ---

    def push_global(self) -> None:
        self._push_name(self._take_line(), self._take_line())

    def push_stack_global(self) -> None:
        self._push_name(*self._pop(2))

    def _push_name(self, module: Value, name: Value) -> None:
        if type(module) is not str or type(name) is not str:
            self._fail(f"a name of {_name(module)} and {_name(name)}", "text")
        found = find_global(module, name)
        if found is None:
            raise refuse("LF901", self._where, f"the name {module}.{name}"[:200], _EXPECTED)
        self._stack.append(found)

    def reduce(self) -> None:
        function, arguments = self._pop(2)
        try:
            self._stack.append(call(function, arguments))
        except UnfitArgumentsError:
            given = ", ".join(map(_name, arguments[:10])) if isinstance(arguments, tuple) else "no tuple"
            found = f"a call of {_name(function)} with ({given})"
            raise refuse("LF901", self._where, found, "calls that torch.save writes") from None

    def push_storage(self) -> None:
        (pid,) = self._pop(1)
        try:
            self._stack.append(make_storage(pid))
        except UnfitArgumentsError:
            raise refuse("LF901", self._where, "a persistent id that is no storage", "storages only") from None

    def build(self) -> None:
        """Drop the state of an OrderedDict, such as the `_metadata` of Module.state_dict(); no other may have one."""
        self._pop(1)
        target = self._top()
        if not isinstance(target, Entries):
            raise refuse("LF901", self._where, f"a state for {_name(target)}", "one for a dictionary")

    def _refuse_opcode(self, code: int) -> NoReturn:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == code), f"0x{code:02x}")
        if code not in _ASK_FOR_CODE:
            self._fail(f"opcode {name}", "one that torch.save writes")
        if name == "INST":
            name = f"{name} of {self._take_line()}.{self._take_line()}"
        raise refuse("LF901", self._where, f"the opcode {name}"[:200], _EXPECTED)

    def _fail(self, found: str, expected: str) -> NoReturn:
        raise refuse("LF123", self._where, f"{found}, at byte {self._place} of the pickle", expected)


def _name(value: Value) -> str:
    return value.name if isinstance(value, Global) else type(value).__name__


_I32: Final = struct.Struct("<i")
_U8, _U16, _U32, _U64 = (struct.Struct(f"<{letter}") for letter in "BHIQ")
_F64: Final = struct.Struct(">d")

_ACTIONS: Final[dict[int, tuple[Callable[..., Value], tuple[Any, ...]]]] = {
    0x95: (_Machine.take_number, (_U64,)),  # The length of a frame, a hint for reading ahead.
    ord("("): (_Machine.mark, ()),
    ord("0"): (_Machine.discard, ()),
    ord("1"): (_Machine.discard_marked, ()),
    ord("q"): (_Machine.remember, (_U8,)),
    ord("r"): (_Machine.remember, (_U32,)),
    0x94: (_Machine.remember, ()),
    ord("h"): (_Machine.recall, (_U8,)),
    ord("j"): (_Machine.recall, (_U32,)),
    ord("N"): (_Machine.push, (None,)),
    0x88: (_Machine.push, (True,)),
    0x89: (_Machine.push, (False,)),
    ord(")"): (_Machine.push, ((),)),
    ord("]"): (_Machine.push_new, (list,)),
    ord("}"): (_Machine.push_new, (Entries,)),
    0x8F: (_Machine.push_new, (Elements,)),
    ord("K"): (_Machine.push_number, (_U8,)),
    ord("M"): (_Machine.push_number, (_U16,)),
    ord("J"): (_Machine.push_number, (_I32,)),
    ord("G"): (_Machine.push_number, (_F64,)),
    0x8A: (_Machine.push_long, (_U8,)),
    0x8B: (_Machine.push_long, (_I32,)),
    ord("C"): (_Machine.push_bytes, (_U8,)),
    ord("B"): (_Machine.push_bytes, (_U32,)),
    0x8E: (_Machine.push_bytes, (_U64,)),
    0x96: (_Machine.push_bytes, (_U64,)),
    0x8C: (_Machine.push_text, (_U8,)),
    ord("X"): (_Machine.push_text, (_U32,)),
    0x8D: (_Machine.push_text, (_U64,)),
    0x85: (_Machine.push_tuple, (1,)),
    0x86: (_Machine.push_tuple, (2,)),
    0x87: (_Machine.push_tuple, (3,)),
    ord("t"): (_Machine.push_tuple, ()),
    0x91: (_Machine.push_frozenset, ()),
    ord("a"): (_Machine.extend, (1,)),
    ord("e"): (_Machine.extend, ()),
    0x90: (_Machine.add, ()),
    ord("s"): (_Machine.set_items, (2,)),
    ord("u"): (_Machine.set_items, ()),
    ord("c"): (_Machine.push_global, ()),
    0x93: (_Machine.push_stack_global, ()),
    ord("R"): (_Machine.reduce, ()),
    ord("Q"): (_Machine.push_storage, ()),
    ord("b"): (_Machine.build, ()),
}
"""Opcode to method and its arguments."""
