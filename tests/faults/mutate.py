"""Damage, by a seed: what can be wrong with a checkpoint, a JSON file or a CSV file, small and large."""

import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

REFUSED, EITHER = "refused", "either"  # has to be refused; or may be harmless
NASTY = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**40, -(2**40), 0.5, -0.0, 1e308, "", "x", "0", "../../etc/passwd",
    "\u0000", "\ud800", "a" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": []}},
)  # fmt: skip
DEEP = "[" * 10_000 + "]" * 10_000


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path: Path, header: bytes | dict[str, Any], data: bytes, size: int | None = None) -> None:
    """The file again; `size` in place of the header's own length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


class Checkpoint:
    """One kind of damage after the other to a folder with config.json, an index, and shards."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.shards = sorted(folder.glob("*.safetensors"))
        self.shard = rng.choice(self.shards)
        self.header, self.data = read_header(self.shard)
        self.name = rng.choice([name for name in self.header if name != "__metadata__"])

    def header_length(self) -> str:
        size = self.rng.choice([len(self.shard.read_bytes()), 2**27, 2**31, 2**63, 2**64 - 1, 0, 1, 2])
        write_header(self.shard, self.header, self.data, size)
        return REFUSED

    def truncated(self) -> str:
        content = self.shard.read_bytes()
        self.shard.write_bytes(content[: self.rng.randrange(len(content))])
        return REFUSED

    def grown(self) -> str:
        self.shard.write_bytes(self.shard.read_bytes() + bytes(self.rng.randrange(1, 100)))
        return REFUSED

    def header_bits(self) -> str:
        content = bytearray(self.shard.read_bytes())
        for _ in range(self.rng.randrange(1, 4)):
            content[self.rng.randrange(8 + len(json.dumps(self.header)))] ^= 1 << self.rng.randrange(8)
        self.shard.write_bytes(bytes(content))
        return EITHER  # a blank may become a tab

    def data_bits(self) -> str:
        data = bytearray(self.data)
        for _ in range(self.rng.randrange(1, 9)):
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        write_header(self.shard, self.header, bytes(data))
        return EITHER

    def offsets(self) -> str:
        begin, end = self.header[self.name]["data_offsets"]
        change = self.rng.randrange(1, 2 * (end - begin) + 4)
        choices: list[Any] = [
            [begin + change, end], [begin, end + change], [begin - change, end - change], [begin + change, end + change],
            [end, begin], [begin, 2**63], [-1, end], [begin + 0.5, end], [begin], [begin, end, end], "0,1", None,
            [str(begin), str(end)],
        ]  # fmt: skip
        self.header[self.name]["data_offsets"] = self.rng.choice(choices)
        write_header(self.shard, self.header, self.data)
        return REFUSED

    def dtype(self) -> str:
        own = self.header[self.name]["dtype"]
        others = ["F64", "F32", "F16", "I8", "BOOL", "F8_E4M3", "U64", "bf16", "", "F99", 16, None, ["F32"]]
        self.header[self.name]["dtype"] = self.rng.choice([one for one in others if one != own])
        write_header(self.shard, self.header, self.data)
        # Another kind of the same width holds other numbers, and they may be numbers.
        return EITHER if self.header[self.name]["dtype"] == "F16" else REFUSED

    def shape(self) -> str:
        shape = self.header[self.name]["shape"]
        wrong = [
            [-one for one in shape], [*shape, 0], [2**63, 2**63], [0], [one + 1 for one in shape], [2**32] * 8, "x", None,
            [str(one) for one in shape], [one + 0.5 for one in shape], [True], shape[0], [2**64, 1],
        ]  # fmt: skip
        self.header[self.name]["shape"] = self.rng.choice(wrong)
        write_header(self.shard, self.header, self.data)
        return REFUSED

    def transposed(self) -> str:
        many = [name for name, one in self.header.items() if name != "__metadata__" and len(set(one["shape"])) > 1]
        if not many:
            return self.shape()
        name = self.rng.choice(many)
        self.header[name]["shape"].reverse()
        write_header(self.shard, self.header, self.data)
        return REFUSED

    def twice_in_one_header(self) -> str:
        text = json.dumps(self.header)
        entry = json.dumps({self.name: self.header[self.name]})[1:-1]
        write_header(self.shard, (text[:-1] + ", " + entry + "}").encode(), self.data)
        return REFUSED

    def header_is_no_object(self) -> str:
        wrong = [b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b"", DEEP.encode(), b'{"a": ' * 9999 + b"1" + b"}" * 9999]
        write_header(self.shard, self.rng.choice(wrong), self.data)
        return REFUSED

    def renamed(self) -> str:
        other = self.rng.choice(["x", self.name + "2", "model.layers.9999999999.x", "", "../" + self.name, "model.layers.-1.a"])
        self.header = {other if name == self.name else name: one for name, one in self.header.items()}
        write_header(self.shard, self.header, self.data)
        return REFUSED

    def index_path(self) -> str:
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        outside = self.folder.parent / "outside.safetensors"
        outside.write_bytes(self.shard.read_bytes())
        bad = [
            "../outside.safetensors",
            str(outside),
            "/etc/passwd",
            "",
            ".",
            "config.json",
            "none.safetensors",
            "a/../../x",
            3,
            None,
        ]
        index["weight_map"][self.name] = self.rng.choice(bad)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return REFUSED

    def link_that_leaves(self) -> str:
        outside = self.folder.parent / "secret.json"
        outside.write_text("secret")
        (self.folder / self.shard.name).unlink()
        os.symlink(outside, self.folder / self.shard.name)
        return REFUSED  # it is no safetensors; links to real shards are how the Hub's cache works

    def one_tensor_in_two_shards(self) -> str:
        other = self.rng.choice([one for one in self.shards if one != self.shard])
        header, data = read_header(other)
        begin, end = self.header[self.name]["data_offsets"]
        header[self.name] = {**self.header[self.name], "data_offsets": [len(data), len(data) + end - begin]}
        write_header(other, header, data + self.data[begin:end])
        return REFUSED

    def index_content(self) -> str:
        path = self.folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        wrong = [b"", b"[]", b"{}", DEEP.encode(), b'{"weight_map": 1}', json.dumps(index).encode()[:-9], b"\x00" * 50]
        path.write_bytes(self.rng.choice(wrong))
        return REFUSED

    def not_a_number(self) -> str:
        names = [name for name in self.header if ".layers." in name and "_proj" in name]
        if not names:
            return self.truncated()
        begin, end = self.header[self.rng.choice(names)]["data_offsets"]
        place = begin + 2 * self.rng.randrange((end - begin) // 2)
        data = bytearray(self.data)
        data[place : place + 2] = struct.pack("<H", self.rng.choice([0x7F80, 0xFF80, 0x7FC0, 0xFFFF]))  # bf16
        write_header(self.shard, self.header, bytes(data))
        return EITHER  # kept as it is where nothing is mixed

    def config_value(self) -> str:
        config = json.loads((self.folder / "config.json").read_text())
        config[self.rng.choice(list(config))] = self.rng.choice(NASTY)
        (self.folder / "config.json").write_text(json.dumps(config))
        return EITHER

    def config_family(self) -> str:
        config = json.loads((self.folder / "config.json").read_text())
        other = self.rng.choice(["gemma2", "phi3", "bert", "mamba", "t5", "nothing", "llava", "gpt2", "qwen2"])
        (self.folder / "config.json").write_text(json.dumps(config | {"model_type": other, "architectures": [other]}))
        return EITHER  # what is not known cannot be checked, and the report says so

    def config_content(self) -> str:
        text = (self.folder / "config.json").read_bytes()
        wrong = [
            b"",
            b"[]",
            b"null",
            DEEP.encode(),
            text[:-5],
            text.replace(b"{", b'{"hidden_size": 1, ', 1),
            b"\xff" + text,
            b"NaN",
        ]
        (self.folder / "config.json").write_bytes(self.rng.choice(wrong))
        return REFUSED

    def code_of_its_own(self) -> str:
        """Code that leaves a mark where it is run."""
        mark = self.folder.parent / "executed"
        code = f"open({str(mark)!r}, 'w').close()\n"
        for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
            (self.folder / name).write_text(code)
        config = json.loads((self.folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
        (self.folder / "config.json").write_text(json.dumps(config))
        return EITHER

    def pickles(self) -> str:
        """Pickles that leave a mark where they are opened."""
        mark = self.folder.parent / "executed"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, (str(mark), "w")

        for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
            (self.folder / name).write_bytes(pickle.dumps(Bomb()))
        if self.rng.random() < 0.5:
            return EITHER  # beside the safetensors: not looked at
        for shard in self.shards:
            shard.unlink()
        (self.folder / "model.safetensors.index.json").unlink()
        return REFUSED

    def chat_template(self) -> str:
        bombs = ["{% for i in range(10**12) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{"]
        (self.folder / "chat_template.jinja").write_text(self.rng.choice(bombs))
        return EITHER


KINDS = [name for name in vars(Checkpoint) if not name.startswith("_")]


def damage(folder: Path, seed: int) -> tuple[str, str]:
    """(what was done, what is expected) to a checkpoint folder."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    return kind, getattr(Checkpoint(folder, rng), kind)()


def damage_text(path: Path, seed: int) -> str:
    """What was done to a text file: bytes, or where it is JSON values, keys and depth."""
    rng = random.Random(seed)
    content = path.read_bytes()
    kind = seed % 6
    if kind == 0:
        path.write_bytes(content[: rng.randrange(len(content))])
        return "truncated"
    if kind == 1:
        data = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        return "bytes"
    if kind == 2:
        path.write_bytes(
            rng.choice([b"", b"\x00" * 100, b"\xff\xfe", DEEP.encode(), b"null", b"[]", b"{}", b"1e999", b"a" * 10_000])
        )
        return "replaced"
    try:
        value = json.loads(content)
    except ValueError:
        lines = content.split(b"\n")
        lines[rng.randrange(len(lines))] = rng.choice([b'"', b",,,,,,,,,", b"\xff", b'"a\nb', b"=cmd()", b"x" * 100_000])
        path.write_bytes(b"\n".join(lines))
        return "line"
    where = list(_places(value))
    parent, key = rng.choice(where)
    if kind == 3:
        del parent[key]
    elif kind == 4 and isinstance(parent, dict):
        parent[rng.choice(["unknown", "", "__class__", key + " "])] = rng.choice(NASTY)
    else:
        parent[key] = rng.choice(NASTY)
    path.write_text(json.dumps(value))
    return "value"


def _places(value: Any) -> Any:
    """(container, key) of everything inside a value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
