"""Figures and tables of evaluate.py's report card. Blue is the model, grey the truth or a reference."""

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

TRUE, DECODED, REFERENCES = "0.55", "tab:blue", ("mean", "first frame", "shuffled vectors", "pixel difference")
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 120})


def as_input(frames, device):
    """Frames (B, S, S, 3) uint8 -> (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255


def panels(cards, title):
    """A figure with one panel per source of cards {source: card} -> figure, pairs (axis, card)."""
    figure = Figure(figsize=(1 + 5 * len(cards), 3.6), layout="constrained")
    axes = figure.subplots(1, len(cards), squeeze=False)[0]
    for axis, name in zip(axes, cards, strict=True):
        axis.set_title(name)
    figure.suptitle(title)
    return figure, zip(axes, cards.values(), strict=True)


def bars(cards):
    """R2 of every probe."""
    figure, parts = panels(cards, "probe of the true action, held-out episodes\nlonger is better; grey: without codes")
    for axis, card in parts:
        rows = card["probe"][::-1]
        values = [max(0, row["r2"] or 0) for row in rows]
        colours = [TRUE if row["method"] in REFERENCES else DECODED for row in rows]
        drawn = axis.barh([row["method"] for row in rows], values, color=colours)
        axis.bar_label(drawn, [shown(row["r2"]) for row in rows], padding=3)
        axis.set(xlabel="R2 of the action, mean over dims", xlim=(0, 1.15))
    return figure


def usage(cards):
    """How often each code is used in each slot, the most used first."""
    figure, parts = panels(cards, "use of the codes, held-out pairs (flat is better)")
    for axis, card in parts:
        share = 100 * np.sort(card["codebook"]["histogram"], 1)[:, ::-1]
        slots, K = share.shape
        for slot, height in enumerate(share):
            label = f"slot {slot}: perplexity {card['codebook']['slots'][slot]['perplexity']:.1f}"
            style = dict(color=DECODED, alpha=1 - 0.7 * slot / slots, label=label)
            axis.bar(np.arange(K) + 0.8 * ((slot + 0.5) / slots - 0.5), height, 0.75 / slots, **style)
        axis.axhline(100 / K, color=TRUE, ls="--", lw=1, label="all codes alike")
        axis.set(xlabel="code, most used first", ylabel="share of the pairs (%)")
        axis.legend(frameon=False)
    return figure


def curves(cards):
    """R2 against the number of labelled episodes."""
    figure, parts = panels(cards, "ridge on few labels (higher is better)\nblue: latents; grey: thumbnails of frames")
    styles = [dict(color=DECODED), dict(color=DECODED, ls="--"), dict(color=TRUE), dict(color=TRUE, ls="--")]
    for axis, card in parts:
        rows = card["few_shot"]
        for method, style in zip(list(rows[0])[1:], styles, strict=True):
            values = [np.nan if row[method] is None else row[method] for row in rows]
            axis.plot([row["episodes"] for row in rows], values, marker="o", ms=3, label=method, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["episodes"] for row in rows], [row["episodes"] for row in rows])
        axis.set(xlabel="labelled training episodes", ylabel="R2 of the action (shown from -0.5)", ylim=(-0.5, 1))
        axis.legend(frameon=False)
    return figure


@torch.no_grad()
def sheet(model, pairs, histogram, device):
    """Four held-out pairs and their reconstruction; then one frame and where each code of each slot leads it."""
    first, second, codes = pairs.first, pairs.second, torch.from_numpy(pairs.codes[pairs.held]).to(device)
    moved = np.abs(np.diff(pairs.small[pairs.held], axis=1)).mean((1, 2)).argsort()
    picks = moved[(np.linspace(0.5, 0.95, 4) * (len(moved) - 1)).astype(int)]  # from the usual to the liveliest
    histogram = np.asarray(histogram)
    (slots, K), base = histogram.shape, picks[2]
    columns = min(K, 12)  # of a large vocabulary the commonest
    words = codes[base].repeat(slots * columns, 1)
    best = np.sort(np.argsort(-histogram, 1, kind="stable")[:, :columns], 1)
    for slot in range(slots):
        words[slot * columns : (slot + 1) * columns, slot] = torch.from_numpy(best[slot]).to(device)

    def decode(frames, words):
        return model.decode(as_input(frames, device), words).permute(0, 2, 3, 1).cpu().numpy()

    made, led = decode(first[picks], codes[picks]), decode(np.repeat(first[base][None], len(words), 0), words)
    width = max(columns + 1, 4)
    figure = Figure(figsize=(1.15 * width, 1.3 * (4 + slots) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4, slots + 0.4])
    names = ("frame", "next, true", "next, decoded", "|decoded - true| x 3")
    for row, (i, image) in zip(upper.subplots(4, 4), zip(picks, made, strict=True), strict=True):
        error = (3 * np.abs(image - second[i] / 255)).clip(0, 1)
        for axis, picture, title in zip(row, (first[i], second[i], image, error), names, strict=True):
            axis.imshow(picture)
            axis.set_title(title if i == picks[0] else "", fontsize=7)
            axis.axis("off")
    for slot, row in enumerate(lower.subplots(slots, columns + 1, squeeze=False)):
        pictures = [first[base], *led[slot * columns : (slot + 1) * columns]]
        titles = ["frame"] + [f"{c}: {100 * histogram[slot, c]:.0f} %" for c in best[slot]]
        for axis, picture, title in zip(row, pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(f"slot {slot}", fontsize=7)
    upper.suptitle("held-out pairs (decoded near true is better)", fontsize=9)
    lower.suptitle(
        "one frame, each code (and its share) in place of its own: each should move something else", fontsize=9
    )
    return figure


# --- the report


def shown(value):
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "| --- " + "| ---: " * (len(head) - 1) + "|"
    for name, *values in rows:
        yield "| " + " | ".join([str(name), *(v if isinstance(v, str) else shown(v) for v in values)]) + " |"


def right(row, what):
    return f"{row['accuracy'][what]:.3f} ({row['balanced_accuracy'][what]:.3f})"


def verdict(name, card):
    """One line on what is good and what to look at."""
    image, book, like = card["reconstruction"], card["codebook"], card["consistency"]
    used, common = np.mean([slot["usage"] for slot in book["slots"]]), book["joint"]["commonest"]
    gain, delta = image["gain"] or 0, image["delta_psnr_shuffled"] or 0
    remarks = [
        (gain > 0, f"{gain:.2f} dB over nothing moves"),
        (delta > 0.1, f"another pair's codes cost {delta:.2f} dB"),
        (used >= 0.9, f"{100 * used:.0f} % of the codes in use"),
        (common <= 0.5, f"the commonest word holds {100 * common:.0f} % of the pairs"),
    ]
    for what, where in dict(cycle="on their own frame", transfer="on other scenes").items():
        mean, chance = np.mean(like[what]), np.mean(like["chance"])
        text = f"{100 * mean:.0f} % of the codes come back {where} (chance {100 * chance:.0f})"
        remarks.append((mean > chance, text))
    if "probe" in card:
        r2 = {row["method"]: row["r2"] or 0 for row in card["probe"]}
        for what in ("first frame", "pixel difference"):
            better = r2["one-hot codes"] > max(0, r2[what])
            remarks.append((better, f"R2 of codes {r2['one-hot codes']:.2f}, of the {what} {r2[what]:.2f}"))
    if not card["started"]:
        remarks.append((False, "the codes have not started yet, so they mean nothing: train on"))
    if card["pairs"] < 100:
        remarks.append((False, f"only {card['pairs']} pairs: indicative"))
    good, bad = ("; ".join(text for ok, text in remarks if bool(ok) == want) or "nothing" for want in (True, False))
    return f"{name}: good: {good}. To look at: {bad}."


def section(card):
    """The tables of one source, line by line."""
    book, like, K = card["codebook"], card["consistency"], len(card["codebook"]["histogram"][0])
    yield f"""{card["pairs"]} held-out pairs of {card["episodes"]} episodes, gap {card["gap"]}.

### Reconstruction

Good: a gain above 0, a delta-PSNR well above 0, most pairs nearer to the future than to now.
"""
    yield from table(["", "value"], [(key.replace("_", " "), v) for key, v in card["reconstruction"].items()])
    yield f"""
### Codes

Good: perplexity near {K}, usage (share of the codes with p > 1 / 10 K) near 1, none that takes most; codes that come
back more often than by chance when the decoded frame is encoded again (cycle), on other scenes too (transfer).
"""
    rows = [
        (f"slot {i}", *slot.values(), like["cycle"][i], like["transfer"][i], like["chance"][i])
        for i, slot in enumerate(book["slots"])
    ]
    joint = book["joint"]
    words = f"{joint['words']} words of {joint['possible']}"
    rows += [("joint", joint["perplexity"], words, joint["commonest"], *"---")]
    yield from table(["", "perplexity", "usage", "commonest", "cycle", "transfer", "chance of both"], rows)
    if "probe" not in card:
        yield f"\nNo probes: {card['no_probe']}."
        return
    probe, eta, labelled = card["probe"], card["eta_squared"], card["labelled"]
    yield f"""
### Probe of the action

Ridge fitted on {labelled["fitted"]} labelled pairs, scored on {labelled["tested"]} of other episodes. Good: codes above
first frame (what the scene tells anyway) and shuffled vectors, and not far below pixel difference (of 8 x 8 thumbnails:
nothing learned). Weighted: dims count by how much they move. A dim of at most 10 values, and the direction of a 2-D
move, are classified too: accuracy (balanced accuracy).
"""
    kinds = list(probe[0]["accuracy"])
    rows = [(r["method"], r["r2"], r["r2_weighted"], r["nmse"], *(right(r, kind) for kind in kinds)) for r in probe]
    yield from table(["features", "R2", "R2 weighted", "NMSE", *kinds], rows)
    yield f"""
eta^2, the share of the actions' variance between words, is {shown(eta["mean"])}; good: well above the
{shown(eta["chance"])} of words dealt at random. R2 per dim, and over each test episode's own variance:
"""
    some = [row for row in probe if row["method"] not in ("mean", "shuffled vectors", "code vectors")]
    rows = [(f"dim {dim}", *(row["r2_per_dim"][dim] for row in some)) for dim in range(len(some[0]["r2_per_dim"]))]
    for episode in list(some[0]["r2_per_episode"])[:20]:
        rows += [(card["names"][episode], *(row["r2_per_episode"][episode] for row in some))]
    yield from table(["", *(row["method"] for row in some)], rows)
    yield """
### Few labels

R2 of a ridge with so many labelled training episodes. Good: codes and vectors above both frames and pixel difference
(inverse dynamics from thumbnails, learned from these labels alone), most of all in the first rows.
"""
    yield from table(list(card["few_shot"][0]), [row.values() for row in card["few_shot"]])


def report(checkpoint, model, cards, remarks, figures):
    """report.md, line by line. cards: {source: card}; remarks: on how the data was chosen; figures: their names."""
    yield from (f"# Report card of {checkpoint}", "")
    yield f"Codes per pair of frames: {model.codes}, each one of {model.quantiser.vocabulary}. Actions: what the robot"
    yield "did in the gap, deltas summed, absolute actions subtracted."
    yield from (*remarks, "")
    yield from (f"- {verdict(name, card)}" for name, card in cards.items())
    for name, card in cards.items():
        yield from ("", f"## {name}", "", *section(card))
    yield from ("", *(f"![{name}](figures/{name}.png)" for name in figures))
