"""A static page of one episode: nothing is loaded from anywhere, and all that a model wrote is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape

from ppojax.viewer.characters import one_line, visible
from ppojax.viewer.colours import LEVELS, MASKS, QUANTITIES, TRAINED, Quantity, Scale, colour, legend, level
from ppojax.viewer.curve import curve_svg
from ppojax.viewer.episode import Block, Episode

_BASE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#667;--line:#d5d8de;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e3e5e8;--soft:#99a;--line:#3a3f48;--paper:#15181c}}
body{margin:1.5rem auto;max-width:70rem;padding:0 1rem;color:var(--ink);background:var(--paper)}
body{font:15px/1.45 sans-serif}
.episode h2{font-size:1.15rem;margin:.2rem 0}
.episode .facts,.episode .head{color:var(--soft)}
.episode .legend{display:none;margin:.4rem 0;font-size:.85rem}
.episode .legend span{padding:0 .5em}
.episode input{margin-left:1em}
.episode .text{font:14px/1.55 monospace;white-space:pre-wrap;overflow-wrap:anywhere;direction:ltr;padding-bottom:3rem}
.episode .text p{margin:0}
.episode .head{font:12px sans-serif;border-top:1px solid var(--line);margin:.6rem 0 .1rem}
.episode .row{border-top:3px double var(--ink);margin:1rem 0 0;font:12px sans-serif}
.episode b,.episode i{font:inherit;unicode-bidi:isolate}
.episode i{color:var(--soft)}
.episode b:hover,.episode i:hover{outline:1px solid var(--ink)}
.episode output{position:fixed;left:0;right:0;bottom:0;padding:.4rem 1rem;background:var(--paper);
border-top:1px solid var(--line);font:13px monospace;white-space:pre-wrap}
.episode output:empty{display:none}
.curve{width:100%;height:auto;margin-top:.6rem}
.curve text{font:10px sans-serif;fill:var(--soft)}
.curve path{fill:none}
.curve .zero,.curve .turn{stroke:var(--line)}
.curve .cut{stroke:var(--ink);stroke-width:2}
.curve .vl{stroke:var(--ink);stroke-width:1.5}
.curve .band{fill:var(--soft);opacity:.3}
"""

_SCRIPT = """
addEventListener("pointerover",e=>{
const t=e.target.closest(".text b,.text i");if(!t)return
const f=t.closest(".episode"),all=[...f.querySelectorAll(".text b,.text i")],n=all.indexOf(t)
const d=f.d??=JSON.parse(f.querySelector("script").textContent)
const a=t.localName=="b"?all.slice(0,n).filter(x=>x.localName=="b").length:-1
let s=`token ${n}  id ${d.id[n]}  ${t.textContent.trim()}  ${a<0?"not the policy's":""}`
for(const k of["logp","advantage","ratio","value","deviation"])if(a>=0&&d[k])s+=`  ${k} ${d[k][a]??"none"}`
if(d.reward[n]!=null)s+=`  reward ${d.reward[n]}`
f.querySelector("output").textContent=s})
"""


def _colour_rules() -> str:
    rules = []
    for quantity in QUANTITIES:
        levels = MASKS if quantity == "mask" else [x for x in range(-LEVELS, LEVELS + 1) if x]
        for at in levels:
            if quantity == "value" and at < 0:
                continue
            (r, g, b), alpha = colour(quantity, at)
            name = _class(quantity, at)
            chosen = f".q{quantity[0]}:checked~.text"
            where = f"{chosen} b" if quantity == "mask" and at == TRAINED else f"{chosen} .{name}"
            rules.append(f"{where},.legend .{name}{{background:rgb({r} {g} {b}/{alpha:.2f})}}")
        rules.append(f".q{quantity[0]}:checked~.l{quantity[0]}{{display:block}}")
    for side, at in (("up", LEVELS), ("dn", -LEVELS)):
        (r, g, b), _ = colour("advantage", at)
        rules.append(f".curve .{side}{{stroke:rgb({r} {g} {b});fill:rgb({r} {g} {b})}}")
    return "\n".join(rules)


def _class(quantity: Quantity, at: int) -> str:
    return f"{quantity[0]}{at}"


STYLE = _BASE.strip() + "\n" + _colour_rules()
SCRIPT = _SCRIPT.strip()


def page(title: str, body: str, style: str = "") -> str:
    """Wrap figures into a page of its own. `title` is text, `body` is markup such as `figure` returns, with `style`.

    The page forbids itself to load anything and to run any script but ours.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name=viewport content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>\n{STYLE}\n{style}</style></head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def figure(episode: Episode, scale: Scale, *, title: str, shown: Quantity = "advantage", name: str = "e") -> str:
    """Draw one episode as markup for a page with `STYLE` and `SCRIPT`: facts, curve, and coloured tokens.

    `name` tells figures of one page apart (letters and digits). A token costs 20 to 70 bytes.
    """
    assert name.isidentifier(), name
    parts = [f"<section class=episode><h2>{_text(title)}</h2>", _facts(episode), curve_svg(episode)]
    for quantity in QUANTITIES:
        key, checked = quantity[0], " checked" if quantity == shown else ""
        label = f"{name}_{key}"
        parts.append(f"<input type=radio class=q{key} name={name} id={label}{checked}>")
        parts.append(f"<label for={label}>{quantity}</label>")
    for quantity in QUANTITIES:
        parts.append(_legend(quantity, episode, scale))
    parts.append(f"<div class=text>{_blocks(episode, scale)}</div>")
    parts.append(f"<output></output><script type=application/json>{_numbers(episode)}</script></section>")
    return "\n".join(part for part in parts if part)


def facts(episode: Episode) -> str:
    """Say in a line what an episode was."""
    failed = f" ({one_line(episode.error)})" if episode.error else ""
    rows = f", {episode.segments} rows" if episode.segments > 1 else ""
    end = episode.ends[-1]
    follows = "" if end is None else f", value {end:.4g} of what would follow"
    return (
        f"step {episode.step}, group {episode.group}, episode {episode.number}: {episode.ending}{failed}, "
        f"reward {episode.reward:.4g}, {episode.turns} turns, {len(episode.tokens)} tokens{rows}{follows}"
    )


def missing(quantity: Quantity, episode: Episode) -> str:
    """Say why a colouring has nothing to show, if so."""
    if quantity == "mask":
        return ""
    known = {
        "advantage": any(token.advantage is not None for token in episode.tokens),
        "value": any(token.value is not None for token in episode.tokens),
        "ratio": any(token.ratio is not None for token in episode.tokens),
    }
    why = {
        "advantage": "no advantage was recorded",
        "value": "no value was recorded: the run has no critic",
        "ratio": "no ratio was recorded: the policy was not trained in this step",
    }
    return "" if known[quantity] else why[quantity]


def heading(block: Block) -> str:
    """Say in a line whose tokens come."""
    who = f"turn {block.turn}" if block.action else "context" if block.first else "observation"
    reward = f", reward {block.reward:.4g}" if block.reward else ""
    return f"{who}, {block.end - block.start} tokens{reward}"


def cut(segment: int, episode: Episode) -> str:
    """Say in a line that the context was replaced and the row `segment` begins (the first is 0)."""
    end = episode.ends[segment - 1]
    return f"row {segment}: the context was compacted" + ("" if end is None else f", value {end:.4g} before it")


def _facts(episode: Episode) -> str:
    return f"<p class=facts>{_text(facts(episode))}</p>"


def _legend(quantity: Quantity, episode: Episode, scale: Scale) -> str:
    said = missing(quantity, episode)
    spans = "".join(
        f'<span class="{_class(quantity, at)}">{_text(name)}</span>' for at, name in legend(quantity, scale) if not said
    )
    return f'<p class="legend l{quantity[0]}">{_text(said)}{spans}</p>'


def _blocks(episode: Episode, scale: Scale) -> str:
    out = []
    for block in episode.blocks():
        if block.first and block.segment:
            out.append(f"<div class=row>{cut(block.segment, episode)}</div>")
        out.append(f"<div class=head>{heading(block)}</div><p>")
        tag = "b" if block.action else "i"
        for token in episode.tokens[block.start : block.end]:
            classes = [_class(q, at) for q in QUANTITIES if (at := level(q, token, scale))]
            kept = [
                c for c in classes if c != _class("mask", TRAINED)
            ]  # what every action is, unless it says otherwise
            attribute = "" if not kept else f" class={kept[0]}" if len(kept) == 1 else f' class="{" ".join(kept)}"'
            out.append(f"<{tag}{attribute}>{escape(visible(token.text, token.id))}</{tag}>")
        out.append("</p>")
    return "".join(out)


def _numbers(episode: Episode) -> str:
    """What is shown of the token under the mouse: nothing but numbers, so that no text can end the script."""
    actions = [token for token in episode.tokens if token.action]
    columns = {
        "logp": [token.logp for token in actions],
        "advantage": [token.advantage for token in actions],
        "ratio": [token.ratio for token in actions],
        "value": [token.value for token in actions],
        "deviation": [token.spread for token in actions],
    }
    record: dict[str, object] = {"id": [token.id for token in episode.tokens]}
    for key, column in columns.items():
        if any(x is not None for x in column):
            record[key] = [_short(x) for x in column]
    record["reward"] = {i: _short(token.reward) for i, token in enumerate(episode.tokens) if token.reward}
    return json.dumps(record, separators=(",", ":"), allow_nan=False)


def _short(x: float | None) -> float | int | None:
    if x is None:
        return None
    rounded = float(f"{x:.4g}")
    return int(rounded) if rounded == int(rounded) else rounded


def _text(text: str) -> str:
    return escape(one_line(text))
