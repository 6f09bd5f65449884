"""What an offline run of W&B keeps on disk."""

import json
import struct
from types import SimpleNamespace

BLOCK, HEADER = 32768, 7  # of the file, a log in LevelDB's format behind as many bytes of its own


def records(path):
    """The records of a `run-ID.wandb`, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK  # the end of a block has no room for a header
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_run(folder):
    """The one offline run below a folder: its `history`, a dictionary a step; its `config`; its `metrics`, name ->
    the axis that it is drawn against, "" for none; its `artifacts`, the paths in each; and its `files`, where pictures
    and tables lie."""
    (file,) = folder.rglob("*.wandb")
    history, config, metrics, artifacts = {}, {}, {}, []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            line = {}
            for item in record.history.item:
                *path, last = item.nested_key
                place = line.setdefault(path[0], {}) if path else line
                place[last] = json.loads(item.value_json)
            history.setdefault(line["_step"], {}).update(line)
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "artifact":
            artifacts.append([entry.path for entry in record.artifact.manifest.contents])
        elif kind == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return SimpleNamespace(
        history=history, config=config, metrics=metrics, artifacts=artifacts, files=file.parent / "files"
    )
