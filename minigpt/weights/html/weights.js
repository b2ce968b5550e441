// Converts the text in the page to arrays of numbers.
//
// The page holds one stream of bytes, compressed by gzip and written in base64. The bytes of a tensor are
// stored by significance: all lowest bytes first, then all second bytes, and so on. This order compresses better.

const numberOfBytes = { float32: 4, float16: 2, int8: 1 };

// base64 -> bytes
function bytesOf(base64) {
  const text = atob(base64.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Decompress parts (texts in base64) to `size` bytes. An incomplete or damaged file is an error.
async function unpack(parts, size) {
  const stream = new DecompressionStream("gzip");
  const writer = stream.writable.getWriter();
  const reader = stream.readable.getReader();
  const bytes = new Uint8Array(size);
  let place = 0;
  const write = async () => {
    for (const part of parts) await writer.write(bytesOf(part));
    await writer.close();
  };
  const read = async () => {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      bytes.set(value, place); // raises a RangeError if there are too many bytes
      place += value.length;
    }
  };
  await Promise.all([write(), read()]);
  if (place !== size) throw new Error(`${place} of ${size} bytes`);
  return bytes;
}

// The 65,536 numbers of float16, as float32.
function float16Table() {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
    else table[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  }
  return table;
}

// Return one tensor of the stream as a Float32Array, row by row. After an int8 tensor come float32 scales, one per row.
function tensorOf(bytes, entry, halves) {
  const count = entry.shape.reduce((a, b) => a * b, 1);
  const width = numberOfBytes[entry.dtype];
  const plane = (number) => bytes.subarray(entry.offset + number * count, entry.offset + (number + 1) * count);
  const out = new Float32Array(count);
  if (entry.dtype === "float32") return float32Of(plane(0), plane(1), plane(2), plane(3));
  if (entry.dtype === "float16") {
    const low = plane(0);
    const high = plane(1);
    for (let i = 0; i < count; i++) out[i] = halves[(high[i] << 8) | low[i]];
    return out;
  }
  const rows = entry.shape[0];
  const columns = count / rows;
  const start = entry.offset + count * width;
  const scalePlane = (number) => bytes.subarray(start + number * rows, start + (number + 1) * rows);
  const scales = float32Of(scalePlane(0), scalePlane(1), scalePlane(2), scalePlane(3));
  const whole = plane(0);
  for (let row = 0; row < rows; row++) {
    for (let i = row * columns; i < (row + 1) * columns; i++) out[i] = ((whole[i] << 24) >> 24) * scales[row];
  }
  return out;
}

function float32Of(first, second, third, fourth) {
  const bits = new Uint32Array(first.length);
  for (let i = 0; i < bits.length; i++) {
    bits[i] = first[i] | (second[i] << 8) | (third[i] << 16) | (fourth[i] << 24);
  }
  return new Float32Array(bits.buffer);
}

// Read the description of the model (JSON) and its tensors.
async function readModel(descriptionParts, descriptionSize, weightParts) {
  const text = new TextDecoder().decode(await unpack(descriptionParts, descriptionSize));
  const about = JSON.parse(text);
  const bytes = await unpack(weightParts, about.bytes);
  const halves = float16Table();
  return { about, tensors: about.tensors.map((entry) => tensorOf(bytes, entry, halves)) };
}
