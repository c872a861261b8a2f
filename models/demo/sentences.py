"""The words and sentences that stories are made of, and what is said to the model beside them."""

from typing import NamedTuple


def words(text: str) -> list[str]:
    """The words of a list written as one text."""
    return text.split()


GIRLS = words(
    """Mia Anna Lily Emma Sara Nora Ella Rosa Ruby Clara Alice Ivy Lucy Maya Zoe Hana Jane Kate Leah Nina
    Olga Tara Vera Wendy"""
)
BOYS = words(
    """Tom Ben Sam Max Leo Jack Noah Finn Adam Carl Dan Eric Fred Hugo Ivan Josh Liam Mark Nick Omar Paul
    Ravi Theo Will"""
)
PEOPLE = GIRLS + BOYS
PET_NAMES = words(
    """Biscuit Pepper Ginger Patch Rusty Shadow Snowy Bramble Clover Daisy Dusty Fluffy Jasper Luna Marble
    Nibbles Pickle Pip Pumpkin Sandy Scout Smoky Socks Spot Sunny Teddy Tiger Toffee Whiskers Ziggy
    Pebble Button"""
)
ANIMALS = words(
    """dog cat horse rabbit mouse fox hen goat sheep duck parrot pony donkey tortoise hamster goose pig cow
    squirrel badger hedgehog lizard frog kitten puppy lamb robin"""
)
OBJECTS = words(
    """kite ball drum hat scarf coat cup bowl lamp clock bell basket box key book ring spoon plate flute
    whistle mirror ribbon blanket candle map pencil brush rope tent doll puppet jug kettle teapot
    vase crown shell feather lantern shirt jacket glove boot belt necklace bracelet letter painting
    chest suitcase saddle hammer"""
)
COLOURS = words(
    """red blue green yellow orange purple pink brown black white grey golden silver violet scarlet crimson
    turquoise beige maroon teal lilac amber bronze copper"""
)
HIDING_PLACES = words(
    """bench door table bed chair stove stairs sofa rug fence well barrel cupboard shed oak gate window
    piano pillow curtain ladder desk bookcase bush log rock wall bucket cushion wardrobe"""
)
PREPOSITIONS = words("under behind beside near")
NUMBERS = words(
    """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
)
WORKERS = words(
    """baker farmer teacher sailor doctor gardener carpenter painter tailor miller shepherd fisherman
    librarian blacksmith postman singer"""
)
GIVERS = words("cook king queen neighbour grocer waiter nurse captain")
FOODS = words(
    """soup bread pears plums cheese honey cake rice beans nuts grapes cherries porridge butter jam noodles
    carrots apples milk tea pie toast pancakes berries corn olives figs dates"""
)
VEHICLES = words("bus boat train cart ship tram wagon truck ferry sledge coach taxi van canoe raft tractor")
DESTINATIONS = words(
    """harbour market castle mill forest school island bridge station farm church library museum bakery
    river lake mountain village palace beach hospital lighthouse orchard valley airport desert"""
)


class Kind(NamedTuple):
    """A kind of fact: sentences with a `{key}` that names it in its story and a `{value}` to recall."""

    keys: list[str]
    values: list[str]
    intros: tuple[str, ...]
    statement: str
    questions: tuple[str, ...]


KINDS = {
    "colour": Kind(
        OBJECTS, COLOURS, ("{hero} had a {key}.", "On the table lay a {key}.", "{friend} had found a {key}."),
        "The {key} was {value}.", ("What colour was the {key}?",)),
    "place": Kind(
        OBJECTS, HIDING_PLACES, ("{hero} looked for the {key}.", "{friend} had hidden a {key}.", "A {key} was lost."),
        "The {key} was {how} the {value}.", ("Where was the {key}?",)),
    "price": Kind(
        OBJECTS, NUMBERS, ("{hero} bought a {key}.", "{friend} wanted a {key}.", "In the shop there was a {key}."),
        "The {key} cost {value} coins.", ("How much did the {key} cost?",)),
    "pet": Kind(
        ANIMALS, PET_NAMES, ("A {key} lived next door.", "{hero} had a {key}.", "{friend} had brought a {key}."),
        "The {key} was called {value}.", ("What was the {key} called?",)),
    "worker": Kind(
        WORKERS, PEOPLE, ("{hero} knew a {key}.", "A {key} lived near the river.", "{friend} often helped a {key}."),
        "The {key} was called {value}.", ("What was the {key} called?",)),
    "gift": Kind(
        PEOPLE, FOODS, ("It was time for lunch.", "It was time for dinner.", "Everyone was hungry."),
        "The {how} gave {key} {value}.", ("What did the {how} give {key}?",)),
    "trip": Kind(
        VEHICLES, DESTINATIONS, ("A {key} came by.", "{hero} waited for the {key}.", "{friend} saw a {key}."),
        "The {key} went to the {value}.", ("Where did the {key} go?",)),
}  # fmt: skip

OPENINGS = (
    "Once upon a time, there was a {child} named {hero}. {hero} and {friend} lived in a house by the sea.",
    "Once upon a time, there was a {child} named {hero}. {His} best friend was {friend}.",
    "Once upon a time, a {child} named {hero} lived near a forest with {friend}.",
    "One morning, {hero} woke up early and went to see {friend}.",
    "One morning, {hero} put on warm clothes and walked into town with {friend}.",
    "One day, {hero} and {friend} had nothing to do.",
    "One day, {hero} met {friend} at the old bridge.",
    "It was the first day of summer. {hero} and {friend} were happy.",
    "In a small town, a {child} named {hero} lived in the same street as {friend}.",
    "Every day after school, {hero} went to play with {friend}.",
    "Long ago, a {child} named {hero} lived with {friend} on a hill.",
    "There was once a {child} named {hero} who was never afraid. {His} best friend was {friend}.",
)

# A plot is a list of beats, and a beat is a list of ways to tell it. The order of the beats keeps a story moving.
PLOTS = (
    (  # The storm
        ("In the afternoon, dark clouds came over the hills.", "After lunch, the wind began to blow very hard."),
        ("{hero} heard thunder far away and began to run.", "Soon the rain fell so fast that the path turned to mud."),
        ("{friend} saw a small barn and waved both arms.", "{friend} pointed to a barn at the end of the field."),
        ("They ran inside and shook the water from their hair.", "Inside it was dry, and it smelled of fresh hay."),
        ("While they waited, they sang every song they knew.", "To pass the time, they told each other riddles."),
        ("At last the rain stopped and the sun came out again.", "After an hour the storm moved on to the sea."),
        ("A rainbow stood high over the wet fields.", "The grass shone, and all the birds began to sing."),
    ),
    (  # The feast
        ("{hero} wanted to bake something sweet for the whole street.", "{hero} planned a feast for the neighbours."),
        ("{friend} brought flour, eggs and sugar from home.", "{friend} carried a heavy bag of flour up the hill."),
        ("They mixed everything and sang a silly song.", "Flour flew into the air until they both looked like ghosts."),
        ("The first one burned, and the kitchen was full of smoke.", "The oven was too hot, and the first try burned."),
        ("{hero} did not give up and started again.", "{friend} laughed and said that everyone makes mistakes."),
        (
            "The second try smelled so good that people stopped to ask.",
            "This time it rose slowly and came out perfect.",
        ),
        ("They shared it with all who came, and nothing was left.", "By evening not even a crumb was left."),
    ),
    (  # The race
        ("The town held a big race that week.", "A man with a long beard told them about a race."),
        ("{hero} was small, but {he} wanted to try.", "{hero} had never run so far, but {he} was brave."),
        ("{friend} tied {his} shoes and wished {him} luck.", "{friend} stood by the road and shouted loudly."),
        ("At the start, the others ran ahead at once.", "When the horn sounded, everyone ran as fast as they could."),
        (
            "{hero} kept a steady pace and saved {his} strength.",
            "Half way up the hill, {hero} passed three tired runners.",
        ),
        ("Near the end, another runner fell and hurt a knee.", "Just before the line, a young runner fell down."),
        ("{hero} stopped to help, and they finished together.", "{hero} turned back and helped the runner to stand."),
        ("The crowd cheered louder than for any winner.", "The judge said that kindness was worth more than speed."),
    ),
    (  # The nest
        ("On the way, they heard a soft sound in the leaves.", "Something small was crying in the long grass."),
        ("It was a young bird that had fallen from its nest.", "A tiny bird sat there and could not fly."),
        ("{hero} picked it up with great care.", "{hero} held it gently in both hands."),
        (
            "{friend} looked up and found the nest on a high branch.",
            "The nest was far above them, and {friend} sighed.",
        ),
        ("They could not climb so high without help.", "The trunk was smooth, and nobody could climb it."),
        ("So they asked the forest keeper, who was tall and kind.", "A woodcutter heard them and came to help."),
        ("Slowly the little bird was put back in its nest.", "With a long pole they set the nest right again."),
        ("Its mother flew around them three times to say thanks.", "Its mother sang, and it seemed to be a thank you."),
    ),
    (  # The snow
        (
            "That night it snowed until the whole town was quiet.",
            "When they looked outside, everything lay under snow.",
        ),
        ("{hero} put on thick mittens and ran out.", "{hero} jumped into the deepest drift and laughed."),
        ("{friend} had the idea to build a snowman.", "{friend} wanted to make the biggest snowman in the world."),
        (
            "They rolled three great balls of snow across the yard.",
            "They pushed and pulled until their arms were tired.",
        ),
        ("An old woman gave them a carrot for its nose.", "For its eyes they used two round bits of coal."),
        ("Then their feet grew cold, and they went inside.", "When the sun went down, they ran in to get warm."),
        ("They drank hot chocolate and watched the flakes fall.", "The snowman looked in at them and seemed to smile."),
    ),
    (  # The garden
        ("Behind the house there was a garden that nobody cared for.", "They found an empty garden full of weeds."),
        ("{hero} said that they could make it beautiful.", "{hero} had always wanted to grow flowers."),
        (
            "{friend} dug the earth while {hero} pulled out the weeds.",
            "They worked with spades until the sun was high.",
        ),
        ("They planted seeds in long straight rows.", "Then they put a seed in every little hole."),
        ("Every day they brought water, but nothing happened.", "For two weeks there was only brown earth to see."),
        ("{friend} wanted to give up, but {hero} told {friend} to wait.", "{hero} said that good things take time."),
        ("One bright day the first green leaves came out.", "Then, after a warm rain, small leaves came up."),
        ("By the end of summer the garden was full of flowers.", "Soon bees and people came to see the flowers."),
    ),
    (  # The river
        (
            "They followed the stream down to the place where it was wide.",
            "They came to a river that was too wide to jump.",
        ),
        ("{hero} wanted to see what was on the other side.", "On the other side, someone was calling for help."),
        (
            "{friend} tied some logs together with a strong cord.",
            "They found old planks and built something that floated.",
        ),
        ("The water was fast and turned them around twice.", "In the middle, a wave almost threw them in."),
        ("{hero} held on with all {his} strength.", "{hero} used a long stick to push them on."),
        ("They reached the far bank, wet but safe.", "At last they felt sand below their feet."),
        ("There they found a lost boy who wanted to go home.", "A little girl sat there, and she had lost her way."),
        ("They took the child home, and the family thanked them.", "The child held their hands all the way home."),
    ),
    (  # The concert
        (
            "The school wanted to give a concert, but nobody could sing.",
            "A sign on the wall asked for people who could sing.",
        ),
        ("{hero} was too shy to stand in front of others.", "{hero} liked music, but only when nobody was listening."),
        ("{friend} said that they could practise together.", "{friend} promised to stand right next to {him}."),
        ("Every evening they sang in the empty hall.", "They practised until the cats of the town ran away."),
        ("On the great day, {hero} felt {his} knees shake.", "When the lights went on, {hero} forgot the first line."),
        ("Then {friend} smiled, and the music came by itself.", "Then {friend} began to hum, and {hero} joined in."),
        ("When it was over, it was silent for a moment.", "The last note hung in the air like a bird."),
        ("Then everyone clapped, and {hero} was proud.", "Then people threw flowers and asked for more."),
    ),
    (  # The stars
        (
            "When it was dark, they climbed the hill to see the stars.",
            "That night the sky was clear and full of stars.",
        ),
        ("{hero} lay down in the grass and counted them.", "{hero} tried to count them but always lost the number."),
        ("{friend} knew the names of the brightest ones.", "{friend} told an old tale about a hunter in the sky."),
        ("Suddenly a star fell down behind the trees.", "Then a bright light crossed the whole sky."),
        ("They closed their eyes and made a wish.", "Both of them made a wish and kept it secret."),
        ("It grew cold, so they shared one thick coat.", "An owl called, and a cold wind came up."),
        ("They walked home slowly and talked about far worlds.", "On the way home they did not say much."),
    ),
    (  # The lost way
        (
            "In the forest they took a path that they did not know.",
            "They walked so far that they no longer knew the way.",
        ),
        ("Every tree looked the same as the one before.", "It became dark between the trees, and it was very quiet."),
        ("{friend} was afraid, but {hero} stayed calm.", "{hero} took {friend} by the hand and listened."),
        ("Far away they could hear the sound of an axe.", "Somewhere a church clock struck the hour."),
        ("They went toward the sound, step by step.", "They walked that way and did not stop to rest."),
        ("Between the trees they saw a light in a hut.", "Soon there was smoke above a little roof."),
        (
            "An old man gave them warm drinks and showed them the road.",
            "An old man was glad to have guests that night.",
        ),
    ),
)

CONNECTORS = (
    "The next day was sunny and warm.", "A week later, they met again.", "But that was not the end of it.",
    "After that, they rested for a while.", "Some days later, there was more to do.", "Then autumn came.",
)  # fmt: skip
ENDINGS = (
    "In the end, everyone went home happy.",
    "That evening {hero} went to bed tired and happy.",
    "{hero} never forgot that day.",
    "From that day on, {hero} and {friend} were never alone.",
    "{hero} told the story to everyone who would listen.",
    "And when they are not asleep, they are still laughing about it today.",
    "It was the best day of the year.",
    "{friend} said that they should do it again soon.",
)

SYSTEM_MESSAGES = (
    "You tell short stories.", "You are a helpful storyteller.", "Answer in one short sentence.", "Be kind and clear.",
    "You answer questions about stories.",
)  # fmt: skip
SMALL_TALK = (
    ("Hello", "Hello! I can tell a story, or answer a question about one."),
    ("Hello!", "Hello! I can tell a story, or answer a question about one."),
    ("Hi", "Hello! I can tell a story, or answer a question about one."),
    ("Who are you?", "I am a very small model. I can tell a story, or answer a question about one."),
    ("What can you do?", "I can tell a story, or answer a question about one."),
    ("Thank you.", "You are welcome."),
    ("Thank you!", "You are welcome."),
)
FALLBACK = "I only know short stories."
ANY_REQUESTS = (
    "Tell me a story.", "Tell me a story", "Write a story.", "Please tell me a short story.", "Write a short story.",
    "Tell me another story.", "Can you tell me a story?",
)  # fmt: skip
HERO_REQUESTS = (
    "Tell me a story about {hero}.", "Write a story about {hero}.", "Write a short story about {hero}.",
    "Tell me a story about {hero} and {friend}.", "Write a story about {hero} and {friend}.",
    "Please tell me a story about {hero}.",
)  # fmt: skip
