"""The stack machine that reads a pickle and executes nothing: what each opcode does, by the name of its work."""

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeAlias

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
_CALLS: Final = "calls that writers of tensors make"

_ASK_FOR_CODE: Final = frozenset(b"oiP\x81\x82\x83\x84\x92\x97\x98")
"""Opcodes whose work is to make objects by name, by number or from outside."""


Actions: TypeAlias = "Mapping[int, tuple[Callable[..., Value], tuple[Any, ...]]]"
"""Opcode to method of the machine and its arguments."""


class Machine:
    """The state of one reading: stack, memo, and where each collection under construction begins."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._place = 0
        self._stack: list[Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, Value] = {}

    def run(self, actions: Actions) -> Value:
        """Return the value that the pickle builds, by what each opcode does."""
        if self._take(1)[0] != _PROTO or self._take(1)[0] not in _PROTOCOLS:
            self._fail(f"the beginning {self._data[:2]!r}", "protocol 2, 3, 4 or 5")
        data = self._data
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
        found = self.find_name(module, name)
        if found is None:
            raise refuse("LF901", self._where, f"the name {module}.{name}"[:200], _EXPECTED)
        self._stack.append(found)

    def reduce(self) -> None:
        function, arguments = self._pop(2)
        try:
            self._stack.append(self.call(function, arguments))
        except UnfitArgumentsError:
            given = ", ".join(map(_name, arguments[:10])) if isinstance(arguments, tuple) else "no tuple"
            found = f"a call of {_name(function)} with ({given})"
            raise refuse("LF901", self._where, found, _CALLS) from None

    def find_name(self, module: str, name: str) -> Global | None:
        """Return the record of a name that may stand in the pickle, None for any other."""
        return find_global(module, name)

    def call(self, function: Value, arguments: Value) -> Value:
        """Return the record that stands for a call; raises UnfitArgumentsError."""
        return call(function, arguments)

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
