"""Class lists of the public benchmarks, with the unseen classes of their zero-shot splits.

PASCAL VOC, PASCAL Context and COCO-Stuff are in the order of Cascade-CLIP's splits (Li et al., ICML 2024, arXiv
2406.00670): `unseen`, published text embeddings and labels follow it. The others are in the datasets' own order.
"""

from __future__ import annotations

from dataclasses import dataclass

from .world.classes import NAMES, UNSEEN


@dataclass(frozen=True)
class Vocabulary:
    """Class names and a zero-shot split of them.

    Args:
        name: its key in `VOCABULARIES`. classes: T names, which label maps index.
        unseen: indices of the classes that are never trained on.
        background: names to prompt with if class 0 is "everything else", which no prompt describes; else empty.

    Raises:
        ValueError: an unseen index is repeated or names no class.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[int, ...] = ()
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.unseen)) < len(self.unseen) or not set(self.unseen) <= set(range(len(self.classes))):
            limit = f"{len(self.classes)}, the number of classes"
            raise ValueError(f"unseen must be different indices below {limit}, got {self.unseen}.")

    @property
    def seen(self) -> tuple[str, ...]:
        """The classes that are trained on, in order."""
        return tuple(name for index, name in enumerate(self.classes) if index not in self.unseen)


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


PASCAL_VOC = Vocabulary(
    "pascal-voc",
    _words(
        """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
        person, pottedplant, sheep, sofa, train, tvmonitor"""
    ),
    unseen=(15, 16, 17, 18, 19),
)

PASCAL_CONTEXT = Vocabulary(
    "pascal-context",
    _words(
        """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, person,
        pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet, ceiling, cloth, computer,
        cup, door, fence, floor, flower, food, grass, ground, keyboard, light, mountain, mouse, curtain, platform, sign,
        plate, road, rock, shelves, sidewalk, sky, snow, bedclothes, track, tree, truck, wall, water, window, wood"""
    ),
    unseen=(0, 2, 3, 7, 9, 13, 17, 19, 31, 37),
)

COCO_STUFF = Vocabulary(
    "coco-stuff",
    _words(  # 80 things in COCO's order, then 91 kinds of stuff by name
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
        parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
        handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
        surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
        broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
        laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
        scissors, teddy bear, hair drier, toothbrush,
        banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
        ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence,
        floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other,
        grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin,
        net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road,
        rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
        structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
        wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood"""
    ),
    unseen=(19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
)

ADE20K_150 = Vocabulary(
    "ade20k-150",
    _words(  # the first synonym of each class
        """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
        door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
        armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
        chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
        case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
        book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
        hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
        dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
        fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
        minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
        screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
        monitor, bulletin board, shower, radiator, glass, clock, flag"""
    ),
)

# The background: the classes of PASCAL Context after the first 20, which are VOC's (CAT-Seg, arXiv 2303.11797).
PASCAL_VOC_20B = Vocabulary(
    "pascal-voc-20b", ("background", *PASCAL_VOC.classes), background=PASCAL_CONTEXT.classes[len(PASCAL_VOC.classes) :]
)

WORLD = Vocabulary("world", NAMES, UNSEEN)  # see `data.world`

_ALL = (PASCAL_VOC, PASCAL_VOC_20B, PASCAL_CONTEXT, COCO_STUFF, ADE20K_150, WORLD)
VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in _ALL}
