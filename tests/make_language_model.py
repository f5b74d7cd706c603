"""Makes `language_model.bin`, a fastText model of three languages in 10 kB for the tests.

Needs the package that trains (`pip install fasttext-numpy2-wheel`); the tests need `fasttext-predict`.
"""

import sys
import tempfile
from pathlib import Path

SENTENCES = {
    "en": "a red bird on the branch of a tree, the house by the sea with a boat and the people of this town,"
    " two dogs that play in the snow, what a view of the mountains, she is making bread for her friends",
    "de": "ein roter Vogel auf dem Ast eines Baumes, das Haus am Meer mit einem Boot und die Leute der Stadt,"
    " zwei Hunde die im Schnee spielen, was für ein Blick auf die Berge, sie backt Brot für ihre Freunde",
    "no": "en rød fugl på grenen av et tre, huset ved sjøen med en båt og folkene i byen, to hunder som leker"
    " i snøen, for en utsikt over fjellene, hun baker brød til vennene sine og jeg ser på",
}


def main(path: Path) -> None:
    import fasttext

    words = {language: text.replace(",", "").split() for language, text in SENTENCES.items()}
    lines = [
        f"__label__{language} {' '.join(found[at : at + 6])}\n"
        for language, found in words.items()
        for at in range(len(found) - 5)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(lines)
        file.flush()
        model = fasttext.train_supervised(
            file.name, dim=8, minn=2, maxn=3, bucket=300, epoch=200, lr=0.05, thread=1, minCount=1, verbose=0
        )
    model.save_model(str(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("language_model.bin"))
