"""Make data/prompts.parquet, the sample prompt table: the same bytes at every run.

Run ``python data/make_prompts.py`` after a change here, and commit the table with it. Another
version of pyarrow writes the same rows, but names itself in the file.
"""

from __future__ import annotations

import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

OUTPUT: Final = Path(__file__).with_name("prompts.parquet")
FIRST_DAY: Final = date(2026, 11, 1)
DAYS: Final = 7

CAMPAIGNS: Final = {
    "Animals": "field-guide",
    "Abstract": "backdrops",
    "Architecture": "city-walks",
    "Food & Drink": "autumn-menu",
    "Landscape": "postcards",
    "People": "makers",
    "Product": "shop-window",
    "Demo": "demo",
}

SCHEMA: Final = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("size", pa.string()),
        pa.field("quality", pa.string()),
        pa.field("seed", pa.int32()),
        pa.field("nsfw_check", pa.bool_()),
        pa.field("num_images", pa.int32()),
        pa.field("category", pa.string(), nullable=False),
        pa.field("campaign", pa.string(), nullable=False),
        pa.field("day", pa.date32(), nullable=False),
    ]
)


class Wish(NamedTuple):
    """One row. None means the default; a seed of None is drawn from the prompt_id."""

    prompt_id: str
    category: str
    prompt: str
    size: str | None = None
    seed: int | None = None
    quality: str | None = None
    num_images: int | None = None
    nsfw_check: bool | None = None


# One row a line reads as the table that it is.
# ruff: noqa: E501
# fmt: off
WISHES: Final = [
    Wish("harbor-dawn-01", "Landscape", "A small fishing harbor at dawn, mist over still water, wooden boats in muted blues and ochre, soft light from the east", "16:9", seed=1001),
    Wish("dune-shadow-01", "Landscape", "Wind-carved dunes in low sun, long shadows, one set of footprints leading over the ridge", "2:1"),
    Wish("fjord-ferry-01", "Landscape", "A red ferry crossing a narrow fjord under heavy clouds, seen from high above, fine rain", "3:2", seed=1003),
    Wish("terrace-rice-01", "Landscape", "Terraced rice fields after rain, mirror-like water, a farmer with a straw hat in the distance", "4:3"),
    Wish("salt-flat-night-01", "Landscape", "A salt flat at night, the Milky Way mirrored in a thin layer of water, one small tent glowing", "16:9", seed=1005, quality="2K"),
    Wish("birch-snow-01", "Landscape", "Birch trunks in fresh snow, a narrow winding path, pale winter sun behind thin cloud", "2:3"),
    Wish("cliff-lighthouse-01", "Landscape", "A white lighthouse on a green cliff, storm waves below, gulls, oil painting with visible strokes", "3:4", seed=1007, num_images=2),
    Wish("lavender-road-01", "Landscape", "Un chemin de terre entre deux champs de lavande, lumière dorée du soir, collines au loin", "5:4"),
    Wish("volcano-ash-01", "Landscape", "Black volcanic sand with bright green moss, a steaming vent, overcast sky, wide view", "2:1", seed=1009),
    Wish("canal-autumn-01", "Landscape", "A quiet canal in autumn, yellow leaves on dark water, a moored narrowboat, watercolor on rough paper", "4:3"),

    Wish("mug-speckled-01", "Product", "A speckled stoneware mug on a linen cloth, morning window light, shallow depth of field, plain background", "1:1", seed=2001, quality="2K"),
    Wish("watch-steel-01", "Product", "A steel wristwatch on dark slate, one hard light from the left, fine reflections, macro photograph", "4:5"),
    Wish("bottle-amber-01", "Product", "An amber glass dropper bottle on wet river stones, fern leaves around it, soft studio light", "4:5", seed=2003),
    Wish("backpack-canvas-01", "Product", "An olive canvas backpack leaning against a mossy boulder, brass buckles, forest light", "3:4"),
    Wish("lamp-paper-01", "Product", "A folded paper lamp glowing on an oak desk, evening room in warm shadow", "1:1", seed=2005, num_images=3),
    Wish("sneaker-float-01", "Product", "A white running shoe floating in mid air, pastel peach background, clean soft shadow below", "5:4"),
    Wish("soap-stack-01", "Product", "Three bars of handmade soap stacked on a marble tray, a sprig of rosemary, top view", "1:1", seed=2007),
    Wish("headphones-foam-01", "Product", "Matte black headphones resting on wavy acoustic foam, blue and magenta rim light", "3:2"),
    Wish("tent-cutaway-01", "Product", "Cutaway illustration of a two-person tent with labels left blank, flat colors, thin outlines", "4:3", seed=2009),

    Wish("ramen-steam-01", "Food & Drink", "A bowl of ramen with a soft egg and spring onions, steam rising, dark wooden counter", "4:5", seed=3001, quality="2K"),
    Wish("bread-crust-01", "Food & Drink", "A round sourdough loaf cut in half on a floured board, crackled crust, side light", "5:4"),
    Wish("lemon-tart-01", "Food & Drink", "A lemon tart with toasted meringue peaks, a slice missing, pale blue plate, top view", "1:1", seed=3003),
    Wish("tea-pour-01", "Food & Drink", "Green tea poured from a cast-iron pot into a small bowl, frozen motion, dark background", "2:3"),
    Wish("market-fruit-01", "Food & Drink", "A market stall of figs, pomegranates and grapes with small paper price cards, midday sun", "3:2", seed=3005, num_images=2),
    Wish("tacos-table-01", "Food & Drink", "Una mesa con tacos al pastor, limones, cilantro y salsas, manos que se sirven, luz de tarde", "4:3"),
    Wish("coffee-tall-01", "Food & Drink", "Iced coffee in a tall glass, milk swirling down through the ice, beige seamless background", "1:2", seed=3007),
    Wish("honey-drip-01", "Food & Drink", "Honey dripping from a wooden dipper onto a comb, backlit gold, extreme close-up", "9:16"),

    Wish("fox-stairs-01", "Animals", "A red fox asleep on stone stairs covered with ivy, dappled light, telephoto photograph", "3:2", seed=4001),
    Wish("heron-reeds-01", "Animals", "A grey heron standing among reeds at first light, ripples around its legs, ink wash painting", "2:3"),
    Wish("octopus-teal-01", "Animals", "An octopus unfolding over coral, teal water, beams of sun from above, high detail", "1:1", seed=4003, quality="2K"),
    Wish("owl-lantern-01", "Animals", "A barn owl on a fence post beside an old lantern, snow falling, storybook illustration", "4:5"),
    Wish("bees-meadow-01", "Animals", "Bees over a meadow of clover and cornflowers, one bee in sharp focus, bright noon", "16:9", seed=4005),
    Wish("cat-bookshop-01", "Animals", "本屋の窓辺で眠る三毛猫、積み重なった古い本、雨の午後、やわらかい光", "3:4"),
    Wish("whale-kite-01", "Animals", "A paper kite in the shape of a whale over a beach, children running below, seen from behind", "9:16", seed=4007),
    Wish("gecko-leaf-01", "Animals", "A small green gecko on the underside of a banana leaf, its shadow showing through from above", "1:2"),

    Wish("stairwell-spiral-01", "Architecture", "A spiral stairwell seen from below, pale concrete, one skylight, strict symmetry", "1:1", seed=5001),
    Wish("library-round-01", "Architecture", "A round reading room with tall shelves and green lamps, evening, wide angle", "2:1", quality="2K"),
    Wish("courtyard-tile-01", "Architecture", "A courtyard with blue and white tiles, a fountain, orange trees in clay pots, hard noon shadows", "4:3", seed=5003),
    Wish("cabin-glass-01", "Architecture", "A glass cabin between pine trees at dusk, warm interior light, a thin layer of snow on the roof", "16:9"),
    Wish("bridge-fog-01", "Architecture", "The towers of a suspension bridge rising out of dense fog, seen from a hill, early morning", "1:2", seed=5005),
    Wish("tram-stop-01", "Architecture", "Eine leere Straßenbahnhaltestelle bei Nacht, nasses Kopfsteinpflaster, Neonlicht spiegelt sich", "9:16", num_images=3),
    Wish("greenhouse-iron-01", "Architecture", "A Victorian iron greenhouse full of palms, condensation on the panes, soft grey daylight", "5:4", seed=5007),
    Wish("rooftops-clay-01", "Architecture", "Clay rooftops of an old hill town, laundry lines, swallows, gouache illustration", "3:4"),

    Wish("potter-hands-01", "People", "A potter's hands shaping a tall vase on the wheel, wet clay, dark apron, side light", "4:5", seed=6001, quality="2K", nsfw_check=True),
    Wish("violin-maker-01", "People", "An old violin maker checking a curved plate against the window, wood shavings on the bench", "3:2", quality="2K", nsfw_check=True),
    Wish("night-baker-01", "People", "A baker sliding loaves into a brick oven at night, orange glow on her face, flour in the air", "2:3", seed=6003, nsfw_check=True),
    Wish("skater-bowl-01", "People", "A skateboarder at the lip of a concrete bowl, frozen mid-turn, long evening shadow", "9:16", nsfw_check=True),
    Wish("chess-park-01", "People", "Two friends playing chess in a park, autumn leaves on the board, candid photograph", "5:4", seed=6005, nsfw_check=True),
    Wish("weaver-loom-01", "People", "Una tessitrice al telaio, fili rossi e indaco, una stanza di pietra con una finestra piccola", "3:4", nsfw_check=True),
    Wish("diver-ladder-01", "People", "A diver in a vintage suit climbing a ladder out of a calm sea, empty horizon, film grain", "1:2", seed=6007, nsfw_check=True),

    Wish("paper-waves-01", "Abstract", "Layered cut paper in waves of coral, sand and navy, soft shadows between the sheets", "2:1", seed=7001, quality="2K"),
    Wish("ink-bloom-01", "Abstract", "Black ink blooming in clear water against white, fine tendrils, high-speed photograph", "1:1", num_images=3),
    Wish("grid-terrazzo-01", "Abstract", "Terrazzo pattern in mint, rust and cream, even spacing, flat and seamless", "1:1", seed=7003),
    Wish("glass-prism-01", "Abstract", "Light through stacked glass prisms, thin spectra on a grey wall, minimal composition", "16:9"),
    Wish("thread-sphere-01", "Abstract", "A sphere wound from thousands of colored threads, floating, black background", "4:5", seed=7005),
    Wish("moss-circuit-01", "Abstract", "A circuit board overgrown with moss and tiny mushrooms, macro, cool green light", "4:3"),
    Wish("dust-orbit-01", "Abstract", "Rings of fine golden dust around an unseen center, long exposure, deep violet dark", "9:16", seed=7007),
    Wish("mountain-lines-01", "Abstract", "远山层叠，只用细线描绘，留白很多，淡墨与一点朱红", "2:3"),

    # These two are for the local emulator, which reads the marker and refuses: a run that meets
    # them shows what becomes of a row that cannot be delivered.
    Wish("demo-refused-at-submit", "Demo", "A paper boat on a pond, for the demonstration of a refusal at submission [emulator: refuse]", "1:1", seed=8001),
    Wish("demo-refused-by-task", "Demo", "A paper crane on a branch, for the demonstration of a task that fails [emulator: fail content_policy_violation]", "1:1", seed=8002),
]
# fmt: on


def make_table() -> pa.Table:
    """Return the sample table."""
    rows = [
        {
            **wish._asdict(),
            "campaign": CAMPAIGNS[wish.category],
            "day": FIRST_DAY + timedelta(days=number % DAYS),
        }
        for number, wish in enumerate(WISHES)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def main(output: Path = OUTPUT) -> None:
    """Write the table. Nothing in it depends on the clock, the machine or the order of a dict."""
    pq.write_table(make_table(), output, compression="zstd", use_dictionary=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
