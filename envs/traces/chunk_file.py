"""One chunk of traces as the bytes of a Parquet file, and back.

Shape suffixes: T tokens, E exits, F feature columns, S softmax columns, D model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offramp.controller.errors import TraceError
from offramp.controller.features import SCHEMAS
from offramp.controller.traces import SOFTMAX_COLUMNS, TraceChunk, TraceHeader


def encode(chunk: TraceChunk, header: TraceHeader) -> bytes:
    """A Parquet file, zstd-compressed.

    Raises:
        TraceError: the chunk has no token, or another number of exits or features.
    """
    if not len(chunk):
        raise TraceError("chunk", "holds no token", "Leave empty documents out")
    if chunk.features_TEF.shape[1:] != _features_shape(header):
        raise TraceError(
            "chunk",
            f"has (exits, features) {chunk.features_TEF.shape[1:]}, not {_features_shape(header)}",
            "Record it with the exits and the feature schema of this store",
        )
    width = 0 if chunk.state_TED is None else chunk.state_TED.shape[2]
    if width != header.width:
        raise TraceError(
            "chunk",
            f"has hidden states of {width} columns, not {header.width}",
            "Record all chunks of a store with states, or none",
        )
    schema = _schema(header)
    columns = [_column(getattr(chunk, field.name), field.type) for field in schema]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def decode(content: bytes, header: TraceHeader, document: str) -> TraceChunk:
    """The chunk that ``encode`` was given.

    Raises:
        TraceError: the bytes are no Parquet file, or its columns are not this schema's.
    """
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:  # Arrow raises OSError for damaged pages
        raise TraceError("chunk", f"is no Parquet file ({error})") from error
    if not table.schema.equals(_schema(header)):
        raise TraceError("chunk", f"has columns {table.schema.names} of another kind")
    arrays = {name: _array(table.column(name)) for name in table.schema.names}
    for name in {"features_TEF", "softmax_TES", "state_TED"} & arrays.keys():
        flat = arrays[name]
        arrays[name] = flat.reshape(len(flat), len(header.exits), -1)
    return TraceChunk(document=document, **arrays)


def _features_shape(header: TraceHeader) -> tuple[int, int]:
    return len(header.exits), SCHEMAS[header.schema].width


def _schema(header: TraceHeader) -> Any:
    exits, width = _features_shape(header)
    columns = {
        "position_T": pa.int32(),
        # Arrow's fixed-size lists nest badly in Parquet: exit-major, E·F values a token.
        "features_TEF": pa.list_(pa.float32(), exits * width),
        "softmax_TES": pa.list_(pa.float32(), exits * len(SOFTMAX_COLUMNS)),
        "exit_token_TE": pa.list_(pa.int32(), exits),
        "full_token_T": pa.int32(),
        "next_token_T": pa.int32(),
        "gap_TE": pa.list_(pa.float32(), exits),
    }
    if header.width:
        columns["state_TED"] = pa.list_(pa.float16(), exits * header.width)
    return pa.schema(columns)


def _column(values: NDArray[Any], kind: Any) -> Any:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, type=kind)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _array(column: Any) -> NDArray[Any]:
    whole = column.combine_chunks()
    if not pa.types.is_fixed_size_list(whole.type):
        return np.asarray(whole.to_numpy(zero_copy_only=False))
    return np.asarray(whole.flatten()).reshape(-1, whole.type.list_size)
