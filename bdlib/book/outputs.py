"""What a reader of a stored notebook should see of a cell's outputs, and whether the cell opens folded."""

WIDGET = "application/vnd.jupyter.widget-view+json"


def readable(outputs: list[dict]) -> list[dict]:
    """The outputs as a terminal would show them at the end: no warnings of the machine that ran them, no widgets without a kernel."""
    kept = []
    for output in outputs:
        if output["output_type"] != "stream":
            kept += [output] if shown(output) else []
        elif output["name"] == "stdout":
            text = "".join(output["text"])
            if kept and kept[-1]["output_type"] == "stream":
                text = kept.pop()["text"] + text
            kept.append({**output, "text": text})
    streams = [{**each, "text": last_line_of_progress(each["text"])} if "text" in each else each for each in kept]
    return [each for each in streams if each.get("text", "something").strip()]


def shown(output: dict) -> bool:
    """False for a widget that has nothing else to show; its view is taken out of the others."""
    data = output.get("data", {})
    live = data.pop(WIDGET, None) is not None
    return not live or set(data) - {"text/plain"} != set()


def last_line_of_progress(text: str) -> str:
    """Each line as it stood at the end: what a carriage return has overwritten is gone, a progress bar that wiped itself too."""
    lines = text.removesuffix("\n").split("\n")
    last = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in lines]
    return "\n".join(new for new, old in zip(last, lines, strict=True) if new or not old) + "\n"


def tags(metadata: dict) -> list[str]:
    """The cell's tags, with `solution` or `check` for what a course grades: these open folded, see book/tree.py."""
    graded = metadata.get("nbgrader", {})
    more = ["solution"] if graded.get("solution") else ["check"] if graded.get("grade") else []
    return list(dict.fromkeys([*metadata.get("tags", []), *more]))
