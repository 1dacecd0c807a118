// A reader, canonical writer and merger of adapters, in plain JavaScript (Node 20, no packages), run over all vectors.
//
//     node spec/conformance/check.mjs [VECTORS]
//
// It is written from SPEC.md, reasons.toml and README.md of this folder's parent alone, to prove that they are enough. It
// prints one line for each vector that it does not pass and a count, and exits with 1 if there was any.

import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

class Refusal extends Error {
  constructor(code, text) {
    super(`${code} ${text}`);
    this.code = code;
  }
}

function refuse(code, text) {
  throw new Refusal(code, text);
}

function demand(condition, code, text) {
  if (!condition) refuse(code, text);
}

// --- strict JSON (R-003) ----------------------------------------------------------------------------------------------
// Objects become Maps. Numbers without fraction and exponent become BigInts, all others Numbers.

const MAX_DEPTH = 32;
const MAX_DIGITS = 21;
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

class JsonParser {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  parseObject() {
    this.skipSpace();
    demand(this.text[this.at] === "{", "LF104", "not a JSON object");
    const value = this.value(1);
    this.skipSpace();
    demand(this.at === this.text.length, "LF104", `text after the JSON object at ${this.at}`);
    return value;
  }

  skipSpace() {
    while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at += 1;
  }

  take(token) {
    this.skipSpace();
    const found = this.text.startsWith(token, this.at);
    if (found) this.at += token.length;
    return found;
  }

  expect(token) {
    demand(this.take(token), "LF104", `no ${token} at ${this.at}`);
  }

  value(depth) {
    this.skipSpace();
    const first = this.text[this.at];
    if (first === "{" || first === "[") {
      demand(depth <= MAX_DEPTH, "LF104", "nested too deep");
      return first === "{" ? this.object(depth) : this.list(depth);
    }
    if (first === '"') return this.string();
    for (const [word, value] of [["true", true], ["false", false], ["null", null]]) {
      if (this.take(word)) return value;
    }
    return this.number();
  }

  object(depth) {
    const found = new Map();
    this.expect("{");
    if (this.take("}")) return found;
    do {
      this.skipSpace();
      const key = this.string();
      demand(!found.has(key), "LF105", `the key ${JSON.stringify(key)} twice`);
      this.expect(":");
      found.set(key, this.value(depth + 1));
    } while (this.take(","));
    this.expect("}");
    return found;
  }

  list(depth) {
    const found = [];
    this.expect("[");
    if (this.take("]")) return found;
    do found.push(this.value(depth + 1));
    while (this.take(","));
    this.expect("]");
    return found;
  }

  string() {
    demand(this.text[this.at] === '"', "LF104", `no string at ${this.at}`);
    let found = "";
    for (this.at += 1; this.text[this.at] !== '"'; this.at += 1) {
      const character = this.text[this.at];
      demand(character !== undefined && character >= " ", "LF104", "a string without end, or a raw control character");
      found += character === "\\" ? this.escape() : character;
    }
    this.at += 1;
    demand(found.isWellFormed(), "LF104", "a lone surrogate");
    return found;
  }

  escape() {
    this.at += 1;
    const letter = this.text[this.at];
    if (letter === "u") {
      const digits = this.text.slice(this.at + 1, this.at + 5);
      demand(/^[0-9a-fA-F]{4}$/.test(digits), "LF104", `the escape \\u${digits}`);
      this.at += 4;
      return String.fromCharCode(parseInt(digits, 16));
    }
    demand(Object.hasOwn(ESCAPES, letter ?? ""), "LF104", `the escape \\${letter}`);
    return ESCAPES[letter];
  }

  number() {
    const form = /(-?)(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;
    form.lastIndex = this.at;
    const match = form.exec(this.text);
    demand(match, "LF104", `no JSON value at ${this.at}`);
    const [text, sign, digits, fraction, exponent] = match;
    this.at = form.lastIndex;
    if (fraction === undefined && exponent === undefined && !(sign && digits === "0")) {
      demand(digits.length <= MAX_DIGITS, "LF104", `a number of ${digits.length} digits`);
      return BigInt(text);
    }
    const value = Number(text);
    demand(Number.isFinite(value), "LF104", `the number ${text}`);
    return value;
  }
}

const parseObject = (text) => new JsonParser(text).parseObject();
const isObject = (value) => value instanceof Map;
const isInteger = (value) => typeof value === "bigint" && value >= 0n;
const isNumber = (value) => typeof value === "bigint" || typeof value === "number";
const isText = (value) => typeof value === "string";

// --- canonical JSON (R-071, R-072) ------------------------------------------------------------------------------------

function writeCanonical(value) {
  if (isObject(value)) {
    const keys = [...value.keys()].sort(); // By UTF-16 code units, as JavaScript compares strings.
    return `{${keys.map((key) => `${JSON.stringify(key)}:${writeCanonical(value.get(key))}`).join(",")}}`;
  }
  if (Array.isArray(value)) return `[${value.map(writeCanonical).join(",")}]`;
  if (typeof value === "bigint") {
    const text = String(Number(value));
    demand(BigInt(Number(value)) === value || text === String(value), "LF104", `no 64-bit float is ${value}`);
    return text;
  }
  return typeof value === "number" ? String(value) : JSON.stringify(value); // String(-0) is "0".
}

// --- the container (section 1) ----------------------------------------------------------------------------------------

const BITS = {
  F64: 64, I64: 64, U64: 64, C64: 64, F32: 32, I32: 32, U32: 32, F16: 16, BF16: 16, I16: 16, U16: 16,
  F8_E4M3: 8, F8_E5M2: 8, F8_E4M3FNUZ: 8, F8_E5M2FNUZ: 8, F8_E8M0: 8, I8: 8, U8: 8, BOOL: 8,
  F6_E2M3: 6, F6_E3M2: 6, F4: 4,
};
const UNFIT = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/u;

function readSafetensors(file) {
  demand(file.length >= 8, "LF101", "shorter than eight bytes");
  const length = file.readBigUInt64LE(0);
  demand(length >= 2n && length <= BigInt(file.length - 8) && length <= 100_000_000n, "LF102", `a header of ${length}`);
  const start = 8 + Number(length);
  const header = parseObject(decodeHeader(file.subarray(8, start)));
  const metadata = readMetadata(header.get("__metadata__") ?? null);
  header.delete("__metadata__");
  const size = BigInt(file.length - start);
  const entries = [...header].map(([name, entry]) => readEntry(name, entry, size));
  const order = (a, b) => Number(a.begin - b.begin) || Number(a.end - b.end);
  let position = 0n;
  for (const entry of entries.sort(order)) {
    demand(entry.begin === position, "LF107", `${entry.name} begins at ${entry.begin}, not at ${position}`);
    position = entry.end;
  }
  demand(position === size, "LF107", `the tensors end at ${position}, the data at ${size}`);
  const tensors = new Map();
  for (const { name, dtype, shape, begin, end } of entries) {
    const data = file.subarray(start + Number(begin), start + Number(end));
    tensors.set(name, { name, dtype, shape: shape.map(Number), data });
  }
  return { metadata, tensors };
}

function decodeHeader(bytes) {
  demand(bytes[0] === 0x7b, "LF103", "the header does not start with {");
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return refuse("LF103", "not UTF-8");
  }
}

function readMetadata(value) {
  if (value === null) return new Map();
  demand(isObject(value) && [...value.values()].every(isText), "LF109", "__metadata__ is not an object of strings");
  return value;
}

function readEntry(name, entry, size) {
  demand(name !== "" && !UNFIT.test(name), "LF301", `the name ${JSON.stringify(name)}`);
  const exact = isObject(entry) && entry.size === 3;
  demand(exact && ["dtype", "shape", "data_offsets"].every((key) => entry.has(key)), "LF109", `the entry of ${name}`);
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((key) => entry.get(key));
  demand(isText(dtype) && Object.hasOwn(BITS, dtype), "LF106", `the dtype of ${name}`);
  demand(Array.isArray(shape) && shape.every(isInteger), "LF109", `the shape of ${name}`);
  demand(shape.length <= 8, "LF110", `${shape.length} axes of ${name}`);
  demand(Array.isArray(offsets) && offsets.length === 2 && offsets.every(isInteger), "LF109", `the offsets of ${name}`);
  const [begin, end] = offsets;
  demand(begin <= end && end <= size, "LF107", `${name} lies from ${begin} to ${end} of ${size}`);
  const bits = BigInt(BITS[dtype]);
  const largest = shape.reduce((product, axis) => product * (axis || 1n), bits);
  const exactly = shape.reduce((product, axis) => product * axis, bits);
  demand(largest < 8n << 63n && exactly === 8n * (end - begin), "LF108", `the size of ${name}`);
  return { name, dtype, shape, begin, end };
}

// --- the manifest (sections 2 to 7) -----------------------------------------------------------------------------------

const SLOTS = ["linear", "linear-transposed", "conv", "embedding", "parameter"];
const RULES = { "alpha/rank": "alpha", "alpha/sqrt(rank)": "alpha", multiplier: "multiplier" };
const FACTOR_DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"];

/** Take the listed fields of an object, `{name: [check, required]}`, and refuse others (R-012). */
function takeFields(object, fields, where) {
  demand(isObject(object), "LF122", `${where} is not an object`);
  const taken = {};
  for (const [name, [check, required]] of Object.entries(fields)) {
    if (!object.has(name)) {
      demand(!required, "LF122", `${where} lacks ${name}`);
      continue;
    }
    taken[name] = object.get(name);
    demand(check(taken[name]), "LF122", `${where}: ${name} has the wrong type`);
  }
  for (const [name, value] of object) {
    const ignored = isObject(value) && value.get("must_understand") === false;
    demand(Object.hasOwn(fields, name) || ignored, "LF120", `${where}: the field ${name}`);
  }
  return taken;
}

function readManifest(text) {
  const manifest = parseObject(text);
  const version = manifest.get("version");
  const form = isText(version) && /^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$/.exec(version);
  demand(form, "LF122", `version ${version}`);
  demand(form[1] === "1", "LF119", `version ${version}`);
  const isTexts = (value) => isObject(value) && [...value.values()].every(isText);
  const fields = takeFields(manifest, {
    version: [isText, true], targets: [isObject, true],
    base: [isObject, false], annotations: [isTexts, false], provenance: [isObject, false],
  }, "manifest");
  const base = takeFields(fields.base ?? new Map(), { name: [isText, false], revision: [isText, false] }, "base");
  const targets = new Map();
  for (const [name, target] of fields.targets) targets.set(name, readTarget(name, target));
  demand(targets.size > 0, "LF212", "no targets");
  return { targets, base, annotations: fields.annotations ?? new Map(), provenance: fields.provenance ?? new Map() };
}

function readTarget(name, value) {
  demand(name !== "", "LF301", "a target without a name");
  const target = takeFields(value, {
    kind: [isText, true], slot: [(slot) => SLOTS.includes(slot), true], rank: [isInteger, true],
    scaling: [isObject, true], fingerprint: [isObject, false], options: [isObject, false],
    shared: [(value) => isObject(value) && [...value.values()].every(isText), false],
  }, name);
  const rule = target.scaling.get("rule");
  demand(isText(rule) && Object.hasOwn(RULES, rule), "LF122", `${name}: scaling rule ${rule}`);
  const scaling = takeFields(target.scaling, { rule: [isText, true], [RULES[rule]]: [isNumber, true] }, name);
  const print = target.fingerprint && takeFields(target.fingerprint, {
    shape: [(s) => Array.isArray(s) && s.length >= 2 && s.length <= 8 && s.every((n) => isInteger(n) && n > 0n), true],
    samples: [(list) => Array.isArray(list) && list.length === 16 && list.every(isNumber), true],
  }, `${name}: fingerprint`);
  const fingerprint = print && { shape: print.shape.map(Number), samples: print.samples.map(Number) };
  const number = Number(scaling[RULES[rule]]);
  const { kind, slot, options = new Map(), shared = new Map() } = target;
  return { name, kind, slot, rank: Number(target.rank), rule, number, fingerprint, options, shared };
}

function scaleOf({ rule, number, rank }) {
  if (rule === "alpha/rank") return number / rank;
  return rule === "alpha/sqrt(rank)" ? number / Math.sqrt(rank) : number;
}

function readAdapter(file) {
  const { metadata, tensors } = readSafetensors(file);
  demand(metadata.has("loraformat"), "LF122", "no manifest");
  const adapter = readManifest(metadata.get("loraformat"));
  for (const target of adapter.targets.values()) target.factors = new Map();
  for (const tensor of tensors.values()) {
    let end = tensor.name.lastIndexOf(".");
    while (end >= 0 && !adapter.targets.has(tensor.name.slice(0, end))) {
      end = end > 0 ? tensor.name.lastIndexOf(".", end - 1) : -1;
    }
    demand(end >= 0, "LF202", `${tensor.name} belongs to no target`);
    adapter.targets.get(tensor.name.slice(0, end)).factors.set(tensor.name.slice(end + 1), tensor);
  }
  takeShared(adapter.targets);
  adapter.warnings = [...adapter.targets.values()].flatMap(checkTarget);
  return adapter;
}

/** Give targets the tensors that are stored with others (R-025). */
function takeShared(targets) {
  const stored = new Map([...targets].map(([name, { factors }]) => [name, new Map(factors)]));
  for (const [name, { shared, factors }] of targets) {
    for (const [role, other] of shared) {
      const tensor = stored.get(other)?.get(role);
      demand(tensor && !stored.get(name).has(role), "LF236", `${name}: ${role} of ${other}`);
      factors.set(role, tensor);
    }
  }
}

/** Which tensors a target before has under the same role: target to role to that target's name. */
function findShared(targets) {
  const owners = new Map();
  const shared = new Map();
  for (const name of [...targets.keys()].sort()) {
    for (const [role, tensor] of targets.get(name).factors) {
      if (!owners.has(tensor)) owners.set(tensor, new Map());
      const roles = owners.get(tensor);
      if (!roles.has(role)) roles.set(role, name);
      else shared.set(name, (shared.get(name) ?? new Map()).set(role, roles.get(role)));
    }
  }
  return shared;
}

const KINDS = { lora: checkLora, replace: checkReplace };

/** Check a target's factors, give it what its kind has of them, return warnings. */
function checkTarget(target) {
  demand(Object.hasOwn(KINDS, target.kind), "LF209", `${target.name}: the kind ${target.kind}`);
  for (const option of target.options.keys()) demand(false, "LF120", `${target.name}: the option ${option}`);
  return KINDS[target.kind](target);
}

/** Check a target of the kind `replace` (R-023, R-030, R-044) and give it the shapes of its parameters. */
function checkReplace(target) {
  const { name, slot, rank, rule, factors } = target;
  demand(slot === "parameter", "LF408", `${name}: the slot ${slot}`);
  demand(rule === "multiplier", "LF122", `${name}: the rule ${rule}`);
  demand(factors.size > 0, "LF201", `${name} has no tensors`);
  for (const [role, { dtype, shape }] of factors) {
    demand(/^[A-Za-z_][A-Za-z0-9_]*$/.test(role), "LF202", `${name}: the role ${role}`);
    demand(FACTOR_DTYPES.includes(dtype), "LF210", `${name}: ${dtype}`);
    demand(shape.length > 0 && !shape.includes(0), "LF203", `${name}: ${role} of shape ${shape}`);
  }
  demand(rank === 0, "LF205", `${name}: rank ${rank}`);
  target.shapes = Object.fromEntries([...factors].map(([role, { shape }]) => [role, shape]));
  return [];
}

/** Check a target of the kind `lora` (R-023, R-030, R-041 to R-045), give it A, B and shape, return warnings. */
function checkLora(target) {
  const { name, slot, rank, factors } = target;
  demand(slot !== "parameter", "LF408", `${name}: the slot ${slot}`);
  const roles = slot === "embedding" ? ["lora_embedding_A", "lora_embedding_B"] : ["lora_A.weight", "lora_B.weight"];
  const beside = slot === "embedding" ? ["base_layer.weight"] : ["lora_B.bias", "base_layer.weight", "base_layer.bias"];
  for (const role of factors.keys()) demand([...roles, ...beside].includes(role), "LF202", `${name}: the role ${role}`);
  for (const role of roles) demand(factors.has(role), "LF201", `${name} lacks ${role}`);
  const [a, b] = roles.map((role) => factors.get(role));
  for (const { dtype } of factors.values()) demand(FACTOR_DTYPES.includes(dtype), "LF210", `${name}: ${dtype}`);
  const axes = slot === "conv" ? [3, 4, 5] : [2];
  demand(axes.includes(a.shape.length) && b.shape.length === a.shape.length, "LF203", `${name}: axes`);
  demand(a.shape[0] > 0 && b.shape[1] > 0, "LF204", `${name}: rank 0`);
  const grouped = slot === "conv" && a.shape[0] !== b.shape[1] && a.shape[0] % b.shape[1] === 0;
  demand(!grouped, "LF209", `${name}: a grouped convolution`);
  const fits = a.shape[0] === b.shape[1] && b.shape.slice(2).every((size) => size === 1);
  demand(fits && !a.shape.includes(0) && !b.shape.includes(0), "LF203", `${name}: A ${a.shape}, B ${b.shape}`);
  demand(rank === a.shape[0], "LF205", `${name}: rank ${rank}`);
  Object.assign(target, { a, b, shape: [b.shape[0], ...a.shape.slice(1)] });
  for (const role of beside.filter((role) => factors.has(role))) {
    const shape = role === "base_layer.weight" ? storedShape(target) : [target.shape[0]];
    demand(String(factors.get(role).shape) === String(shape), "LF203", `${name}: ${role}`);
  }
  const warnings = rank > Math.min(b.shape[0], product(a.shape.slice(1))) ? ["LF206"] : [];
  return [a, b].some((factor) => numbersOf(factor).every((x) => x === 0)) ? [...warnings, "LF214"] : warnings;
}

/** The shape of a target's weight in the state dict. */
function storedShape({ slot, shape }) {
  return slot === "embedding" || slot === "linear-transposed" ? shape.toReversed() : shape;
}

const product = (sizes) => sizes.reduce((all, size) => all * size, 1);

// --- canonical bytes (section 8) --------------------------------------------------------------------------------------

function mapOf(object) {
  return new Map(Object.entries(object).filter(([, value]) => value !== undefined));
}

function writeAdapter({ targets, base, annotations, provenance }) {
  const named = new Map();
  const sharing = findShared(targets);
  for (const { name, kind, slot, rank, rule, number, fingerprint } of targets.values()) {
    const scaling = mapOf({ rule, [RULES[rule]]: number });
    const shared = sharing.get(name);
    named.set(name, mapOf({ kind, slot, rank, scaling, shared, fingerprint: fingerprint && mapOf(fingerprint) }));
  }
  const binding = mapOf({ name: base.name || undefined, revision: base.revision || undefined });
  const manifest = mapOf({ version: sharing.size > 0 ? "1.1" : "1.0", targets: named });
  for (const [key, value] of Object.entries({ base: binding, annotations, provenance })) {
    if (value.size > 0) manifest.set(key, value);
  }
  const tensors = [...targets.values()].flatMap(({ name, factors }) =>
    [...factors].filter(([role]) => !sharing.get(name)?.has(role)).map(([role, t]) => ({ ...t, name: `${name}.${role}` })),
  );
  tensors.sort((x, y) => BITS[y.dtype] - BITS[x.dtype] || Buffer.compare(Buffer.from(x.name), Buffer.from(y.name)));
  const header = new Map([["__metadata__", mapOf({ loraformat: writeCanonical(manifest) })]]);
  let end = 0;
  for (const { name, dtype, shape, data } of tensors) {
    header.set(name, mapOf({ dtype, shape, data_offsets: [end, (end += data.length)] }));
  }
  const text = Buffer.from(writeCanonical(header));
  const padded = Buffer.concat([text, Buffer.alloc((8 - (text.length % 8)) % 8, " ")]);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  return Buffer.concat([length, padded, ...tensors.map((tensor) => tensor.data)]);
}

// --- numbers ----------------------------------------------------------------------------------------------------------

// [bits of exponent, bits of fraction, bias, what the top exponent holds]
const SMALL = {
  F16: [5, 10, 15, "infinity"], BF16: [8, 7, 127, "infinity"],
  F8_E4M3: [4, 3, 7, "one NaN"], F8_E5M2: [5, 2, 15, "infinity"],
  F8_E4M3FNUZ: [4, 3, 8, "numbers"], F8_E5M2FNUZ: [5, 2, 16, "numbers"], // Their one NaN is minus zero.
};

function decodeSmall(bits, [exponentBits, fractionBits, bias, top]) {
  const sign = bits >> (exponentBits + fractionBits) ? -1 : 1;
  const exponent = (bits >> fractionBits) & (2 ** exponentBits - 1);
  const fraction = bits & (2 ** fractionBits - 1);
  if (exponent === 2 ** exponentBits - 1) {
    if (top === "infinity") return fraction ? NaN : sign * Infinity;
    if (top === "one NaN" && fraction === 2 ** fractionBits - 1) return NaN;
  }
  if (top === "numbers" && sign < 0 && !exponent && !fraction) return NaN;
  const steps = exponent ? fraction + 2 ** fractionBits : fraction;
  return sign * steps * 2 ** (Math.max(exponent, 1) - bias - fractionBits);
}

/** Return the bits of the nearest number, ties to even; null when it leaves the range. */
function encodeSmall(value, [exponentBits, fractionBits, bias]) {
  const sign = Object.is(value, -0) || value < 0 ? 2 ** (exponentBits + fractionBits) : 0;
  const magnitude = Math.abs(value);
  let exponent = Math.floor(Math.log2(magnitude || 1));
  if (2 ** exponent > magnitude && magnitude) exponent -= 1;
  if (2 ** (exponent + 1) <= magnitude) exponent += 1;
  exponent = magnitude ? Math.max(exponent, 1 - bias) : 1 - bias;
  let steps = roundEven(magnitude / 2 ** (exponent - fractionBits));
  if (steps === 2 ** (fractionBits + 1)) [steps, exponent] = [steps / 2, exponent + 1];
  if (exponent > bias) return null;
  // The leading bit of a normal number adds one to the exponent's field; a subnormal one has none.
  return sign + (exponent + bias - 1) * 2 ** fractionBits + steps;
}

function roundEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

function numbersOf({ dtype, data }) {
  const size = BITS[dtype] / 8;
  return Array.from({ length: data.length / size }, (_, index) => {
    const at = index * size;
    if (dtype === "F64") return data.readDoubleLE(at);
    if (dtype === "F32") return data.readFloatLE(at);
    return decodeSmall(data.readUIntLE(at, size), SMALL[dtype]);
  });
}

function encodeNumber(value, dtype, name) {
  const bytes = Buffer.alloc(BITS[dtype] / 8);
  if (dtype === "F64") bytes.writeDoubleLE(value);
  else if (dtype === "F32") bytes.writeFloatLE(value);
  else {
    const bits = encodeSmall(value, SMALL[dtype]);
    demand(bits !== null, "LF503", name);
    bytes.writeUIntLE(bits, 0, bytes.length);
  }
  demand(Number.isFinite(value) && (dtype !== "F32" || Number.isFinite(Math.fround(value))), "LF503", name);
  return bytes;
}

// --- merging (sections 7 and 9) ---------------------------------------------------------------------------------------

/** Where the canonical matrix's number at a row and column stands in the stored tensor. */
function placeOf({ slot, shape }, row, column) {
  const [rows, columns] = [shape[0], product(shape.slice(1))];
  return slot === "embedding" || slot === "linear-transposed" ? column * rows + row : row * columns + column;
}

function checkFingerprint(target, stored) {
  const { name, shape, fingerprint } = target;
  if (!fingerprint) return;
  const most = Math.max(...fingerprint.samples.map(Math.abs));
  const [rows, columns] = [BigInt(shape[0]), BigInt(product(shape.slice(1)))];
  const matches = fingerprint.samples.every((sample, index) => {
    const hash = createHash("sha256").update(`loraformat-fingerprint-1\n${name}\n${index}`).digest();
    const place = placeOf(target, Number(hash.readBigUInt64BE(0) % rows), Number(hash.readBigUInt64BE(8) % columns));
    return Math.abs(sample - Math.fround(stored[place])) <= 2 ** -8 * Math.abs(sample) + 2 ** -12 * most;
  });
  demand(matches && String(fingerprint.shape) === String(shape), "LF406", name);
}

/** Add one target's delta to `sum`, in binary32, in the layout of the stored tensor. */
function addDelta(target, weight, sum) {
  const [a, b] = [numbersOf(target.a), numbersOf(target.b)];
  const factor = scaleOf(target) * weight;
  const columns = product(target.shape.slice(1));
  for (let row = 0; row < target.shape[0]; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      let delta = 0;
      for (let r = 0; r < target.rank; r += 1) {
        const scaled = Math.fround(b[row * target.rank + r] * factor);
        delta = Math.fround(delta + Math.fround(scaled * a[r * columns + column]));
      }
      const place = placeOf(target, row, column);
      sum[place] = Math.fround(sum[place] + delta);
    }
  }
}

/** Return the numbers of a parameter that V replaces: W + λ·(V − W), and for λ = 1 V itself. */
function replaceNumbers({ dtype, data }, values, factor) {
  const fit = dtype === "F64" ? (x) => x : Math.fround;
  const between = (w, v) => (factor === 1 ? v : fit(w + fit(factor * fit(v - w))));
  return numbersOf({ dtype, data }).map((w, i) => between(w, values[i]));
}

/** Return each tensor of the merged state dict, its bytes in hexadecimal. */
function merge(base, adapters, minRetained) {
  const { tensors } = readSafetensors(base);
  const sums = new Map();
  const replaced = new Map();
  for (const { adapter, weight } of adapters) {
    for (const target of adapter.targets.values()) {
      const numbers = [...target.factors.values()].flatMap(numbersOf);
      demand(numbers.every(Number.isFinite), "LF501", target.name);
      demand(scaleOf(target) !== 0, "LF208", target.name);
      const whole = target.kind === "replace";
      for (const [role, saved] of target.factors) {
        const parameter = whole ? role : role.startsWith("base_layer.") && role.slice("base_layer.".length);
        if (!parameter) continue;
        const stored = find(tensors, `${target.name}.${parameter}`, saved.shape);
        demand(!replaced.has(stored.name), "LF409", stored.name);
        const factor = whole ? scaleOf(target) * weight : weight;
        replaced.set(stored.name, { target, values: replaceNumbers(stored, numbersOf(saved), factor) });
      }
      if (whole) continue;
      const stored = find(tensors, `${target.name}.weight`, storedShape(target));
      checkFingerprint(target, numbersOf(stored));
      addDelta(target, weight, sumOf(sums, stored, target));
      const bias = target.factors.get("lora_B.bias");
      if (!bias) continue;
      const sum = sumOf(sums, find(tensors, `${target.name}.bias`, bias.shape), target);
      numbersOf(bias).forEach((x, i) => (sum[i] = Math.fround(sum[i] + Math.fround(x * scaleOf(target) * weight))));
    }
  }
  const merged = {};
  for (const [name, tensor] of tensors) {
    const [added, start] = [sums.get(name), replaced.get(name)];
    demand(!added || !start || added.targets.every((target) => target === start.target), "LF409", name);
    const bytes = start || added ? mergeTensor(tensor, start?.values, added?.sum, minRetained) : tensor.data;
    merged[name] = bytes.toString("hex");
  }
  return merged;
}

function find(tensors, name, shape) {
  const stored = tensors.get(name);
  demand(stored, "LF401", name);
  demand(String(shape) === String(stored.shape), "LF405", name);
  return stored;
}

/** Return the sum of what is added to a tensor, zeros at first, and note the target that adds to it. */
function sumOf(sums, stored, target) {
  if (!sums.has(stored.name)) sums.set(stored.name, { sum: numbersOf(stored).fill(0), targets: [] });
  sums.get(stored.name).targets.push(target);
  return sums.get(stored.name).sum;
}

/** Return the merged bytes of a tensor whose numbers `start` replaces, or not, and to which `sum` is added, or nothing. */
function mergeTensor({ name, dtype, data }, start, sum, minRetained) {
  const before = numbersOf({ dtype, data });
  if (!sum) return Buffer.concat(start.map((x) => encodeNumber(x, dtype, name)));
  const total = (x, index) => (dtype === "F64" ? x + sum[index] : Math.fround(x + sum[index]));
  const bytes = Buffer.concat((start ?? before).map((x, index) => encodeNumber(total(x, index), dtype, name)));
  if (start) return bytes;
  const after = numbersOf({ dtype, data: bytes });
  const kept = sum.reduce((all, delta, index) => all + delta * (after[index] - before[index]), 0);
  const wanted = sum.reduce((all, delta) => all + delta * delta, 0);
  demand(minRetained === undefined || kept >= minRetained * wanted, "LF504", name);
  return bytes;
}

// --- the vectors ------------------------------------------------------------------------------------------------------

const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");
const same = (found, wanted) => JSON.stringify(sorted(found)) === JSON.stringify(sorted(wanted));

function sorted(value) {
  if (Array.isArray(value) || value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

function checkValid(folder, expected) {
  const adapter = readAdapter(readFileSync(join(folder, "adapter.safetensors")));
  const targets = {};
  for (const target of adapter.targets.values()) {
    const { name, kind, slot, rank, shape, shapes } = target;
    targets[name] = { kind, slot, rank, scale: scaleOf(target), ...(shapes ? { shapes } : { shape }) };
  }
  if (!same(targets, expected.targets)) return `targets ${JSON.stringify(targets)}`;
  if (!same([...new Set(adapter.warnings)].sort(), expected.problems)) return `warnings ${adapter.warnings}`;
  if (expected.canonical_codes) return checkRefusal(() => writeAdapter(adapter), expected.canonical_codes);
  const written = writeAdapter(adapter);
  const again = writeAdapter(readAdapter(written));
  return digest(written) === expected.canonical_sha256 && again.equals(written) ? "" : `wrote ${written}`;
}

function checkRefusal(work, codes) {
  try {
    work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return codes.includes(error.code) ? "" : error.message;
  }
  return "not refused";
}

function mergeAll(folder, expected, base) {
  const read = (file) => readAdapter(readFileSync(join(folder, file)));
  const adapters = expected.adapters.map(({ file, weight }) => ({ adapter: read(file), weight }));
  return merge(readFileSync(join(folder, base)), adapters, expected.min_retained);
}

function checkMerged(folder, expected) {
  const wrong = Object.keys(expected.merged).filter(
    (base) => !same(mergeAll(folder, expected, base), expected.merged[base]),
  );
  return wrong.map((base) => `other bits than expected in ${base}`).join(", ");
}

const CHECKS = {
  valid: checkValid,
  invalid(folder, expected) {
    return checkRefusal(() => readAdapter(readFileSync(join(folder, "adapter.safetensors"))), expected.codes);
  },
  merged: checkMerged,
  refused(folder, expected) {
    const base = readdirSync(folder).find((name) => name.startsWith("base."));
    return checkRefusal(() => mergeAll(folder, expected, base), expected.codes);
  },
  converted(folder, expected) { // Reading PEFT is not part of the format; that the result is canonical is.
    const file = readFileSync(join(folder, "native.safetensors"));
    return digest(file) === expected.sha256 && writeAdapter(readAdapter(file)).equals(file) ? "" : "not canonical";
  },
};

function attempt(folder) {
  const expected = JSON.parse(readFileSync(join(folder, "expected.json"), "utf8"));
  try {
    return CHECKS[expected.verdict](folder, expected);
  } catch (error) {
    return error instanceof Refusal ? error.message : error.stack;
  }
}

const vectors = process.argv[2] ?? join(dirname(fileURLToPath(import.meta.url)), "..", "vectors");
const counts = {};
let failures = 0;
for (const kind of ["valid", "invalid", "merge", "convert"]) {
  for (const name of readdirSync(join(vectors, kind)).sort()) {
    if (!existsSync(join(vectors, kind, name, "expected.json"))) continue;
    const wrong = attempt(join(vectors, kind, name));
    counts[kind] = (counts[kind] ?? 0) + (wrong ? 0 : 1);
    failures += wrong ? 1 : 0;
    if (wrong) console.log(`${kind}/${name}: ${wrong}`);
  }
}
console.log(Object.entries(counts).map(([kind, count]) => `${count} ${kind}`).join(", ") + ` passed, ${failures} failed`);
process.exitCode = failures ? 1 : 0;
