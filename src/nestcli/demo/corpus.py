"""Make a small corpus of synthetic speech and noise: the same files for the same seed.

Speech comes from `nestcli.demo.synthesis`, noise from numpy. Each speaker and each kind of noise has its own random
generator, so that none depends on the draws of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf

from nestcli.demo.synthesis import SAMPLE_RATE, Synthesizer, Voice

FloatArray = npt.NDArray[np.floating[Any]]

SHORTEST, LONGEST = 2.0, 8.0  # seconds per utterance
NOISE_FILES_PER_KIND = 3
LOUDEST_PEAK = 0.9  # share of full scale

VOICES = (
    Voice("walter", "en-us", "m3", pitch=42, rate=160),
    Voice("amelia", "en-us", "f2", pitch=50, rate=168),
    Voice("hector", "en-us", "Alex", pitch=60, rate=172),
    Voice("nora", "en-us", "Annie", pitch=46, rate=158),
    Voice("edgar", "en", "m7", pitch=52, rate=155),
    Voice("martha", "en", "aunty", pitch=48, rate=163),
    Voice("rupert", "en-gb-x-rp", "quincy", pitch=44, rate=150),
    Voice("cecily", "en-gb-x-rp", "belinda", pitch=52, rate=165),
    Voice("angus", "en-gb-scotland", "m1", pitch=38, rate=170),
    Voice("isla", "en-gb-scotland", "f5", pitch=42, rate=162),
    Voice("desmond", "en-029", "Nguyen", pitch=40, rate=158),
    Voice("shanice", "en-029", "f3", pitch=56, rate=170),
    Voice("harold", "en-gb-x-gbclan", "pablo", pitch=58, rate=166),
    Voice("joan", "en-gb-x-gbcwmd", "linda", pitch=40, rate=156),
    Voice("vinnie", "en-us-nyc", "rob", pitch=64, rate=176),
    Voice("jonas", "de", "m4", pitch=54, rate=158),
    Voice("lucia", "es", "f4", pitch=62, rate=165),
    Voice("meilin", "cmn", "Alicia", pitch=54, rate=160),
)

ENGLISH = """
The first train leaves at six, and it is always full by the second stop.
She wrote the address on the back of an old envelope.
We waited under the bridge until the rain had passed.
Nobody remembered who had painted the kitchen yellow.
My brother repairs bicycles in a shed behind the house.
Please put the large plates on the upper shelf.
The museum opens late on Thursdays during the summer.
He counted the coins twice and still came up short.
A narrow path runs along the river to the next village.
Their dog barks at the postman but never at the thieves.
I have lost my glasses again, and they are not on my head.
The soup needs a little more salt and a great deal more time.
Fresh snow covered the roofs before anyone woke up.
You can borrow the ladder if you bring it back by noon.
The baker saves the burnt loaves for the ducks.
Three ships were waiting outside the harbour for the tide.
It took him a whole year to learn that song on the piano.
The meeting was moved to a smaller room without windows.
Grandmother kept her buttons in a blue tin box.
Turn left at the chapel and follow the stone wall.
The children built a castle from empty boxes.
There is a spare key beneath the flower pot.
Our neighbours grow tomatoes, beans and far too much mint.
The clock in the hall has been five minutes fast since spring.
Do you know whether the library is open on Sunday?
A cold wind came down from the mountains after dark.
He poured the coffee slowly and looked out at the street.
The lecture was long, but the questions were even longer.
She would rather walk than wait for another bus.
Every shelf in the pantry was labelled in green ink.
The farmer sold his last horse to a travelling circus.
What did you do with the map that I gave you?
An orange cat sleeps on the counter of the book shop.
They measured the room and ordered exactly the wrong carpet.
The lights went out just as the music began.
I would like two tickets for the evening show, please.
Her uncle works at the airport and hates flying.
The path was muddy, so we turned back before the lake.
Somebody has left a wet umbrella in the corridor.
The doctor told him to drink more water and less coffee.
On clear nights you can see the lighthouse from here.
We planted the apple tree in the year you were born.
The teacher drew a perfect circle on the board.
This bridge was built long before the railway came.
He folds his newspaper into a hat when the sun is strong.
Could you hold the door while I carry the boxes?
The price of butter has doubled in less than ten years.
A young fox crossed the garden without any hurry.
Most of the guests had already gone when the cake arrived.
The radio only works if you lean it against the window.
She speaks softly, yet everybody in the room listens.
Their boat is small, but it has crossed the sea twice.
The carpenter smoothed the table top with his bare hand.
We heard thunder, and then the whole valley was silent.
My sister collects stamps with pictures of birds.
The last page of the letter was missing.
He answered every question with another question.
Boil the eggs for seven minutes and cool them in ice.
The theatre burned down, and they rebuilt it in brick.
Nothing grows in the shade of that enormous tree.
I met your cousin at the market on Saturday morning.
The engine coughed twice and finally started.
Our teacher reads aloud to us whenever it rains.
A single candle was burning in the upstairs window.
They painted the fence white, and the goats ate the paint.
The village has two churches, one pub and no shop at all.
If you are cold, there is a blanket on the chair.
Seven swans were resting on the frozen pond.
The tailor shortened the sleeves by about an inch.
Tomorrow we shall drive to the coast and eat fried fish.
He keeps a spare pair of shoes under his desk.
The judge asked the witness to speak a little louder.
She found a silver ring inside the old piano.
Half of the class was ill, and the other half was singing.
The ferry was late because of the fog.
Who left the gate open and let the sheep out?
The jam has to simmer until it sticks to the spoon.
Far away a church bell rang, eleven times or twelve.
The young engineer drew her plans on brown paper.
It is easier to find a friend than a good plumber.
"""

GERMAN = """
Am Morgen fährt der erste Zug über die alte Brücke.
Meine Schwester hat den Schlüssel auf dem Tisch vergessen.
Im Garten blühen die Kirschbäume schon seit einer Woche.
Der Bäcker an der Ecke macht das beste Brot der Stadt.
Wir haben zwei Stunden auf den Bus gewartet.
Können Sie mir bitte das Fenster öffnen?
Der Hund schläft am liebsten unter dem Küchentisch.
Nach dem Regen roch die Straße nach warmem Stein.
Mein Großvater erzählte gern von seinen Reisen ans Meer.
Heute Abend kochen wir Suppe mit Kartoffeln und Lauch.
"""

SPANISH = """
El tren de las ocho siempre llega un poco tarde.
Mi abuela guarda las cartas viejas en una caja azul.
Los niños juegan en la plaza hasta que se hace de noche.
¿Sabe usted dónde está la estación de autobuses?
Esta mañana compramos naranjas y pan en el mercado.
El gato duerme junto a la ventana de la cocina.
Después de la lluvia salieron todos a pasear.
Mi hermano aprende a tocar la guitarra desde el verano.
La puerta del jardín no cierra bien cuando hace frío.
Vamos a cenar pescado con arroz y un poco de limón.
"""

MANDARIN = """
今天下午我们一起去公园散步。
我的哥哥在火车站旁边工作。
请你把窗户打开，房间里太热了。
她每天早上喝一杯茶，然后去上班。
昨天晚上下了大雨，路上都是水。
孩子们在学校里学习唱歌和画画。
你知道图书馆几点开门吗？
冬天的时候，湖上的冰很厚。
妈妈做的汤又热又好喝。
我们坐船过河，到对面的村子去。
"""

SENTENCES = {"de": GERMAN, "es": SPANISH, "cmn": MANDARIN}  # all other voices speak English


@dataclass(frozen=True)
class CorpusSummary:
    """The output of `make_corpus`: two folders, the speakers, the number of files and their total seconds."""

    speech: Path
    noise: Path
    speakers: tuple[str, ...]
    utterances: int
    speech_seconds: float
    noise_files: int
    noise_seconds: float


def make_corpus(
    out: Path, *, minutes: float, seed: int, progress: Callable[[int, int], None] | None = None
) -> CorpusSummary:
    """Write `out/speech/<speaker>/<speaker>_<nnn>.flac` and `out/noise/<kind>/<kind>_<n>.flac`.

    All files are 16 kHz, 16 bit, mono; existing files with the same names are overwritten. The speakers share
    `minutes` of speech evenly, and each says at least one utterance. `progress` is called with whole seconds of
    speech: done, total.

    Raises MissingDependencyError without espeak-ng, ValueError if `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: {minutes} must be above 0.")
    speech, noise = out / "speech", out / "noise"
    lengths = _write_speech(speech, 60 * minutes, seed, progress or (lambda done, total: None))
    noise_lengths = _write_noise(noise, sorted(lengths), seed)
    return CorpusSummary(
        speech=speech,
        noise=noise,
        speakers=tuple(voice.name for voice in VOICES),
        utterances=len(lengths),
        speech_seconds=sum(lengths.values()),
        noise_files=len(noise_lengths),
        noise_seconds=sum(noise_lengths),
    )


def _write_speech(folder: Path, seconds: float, seed: int, progress: Callable[[int, int], None]) -> dict[Path, float]:
    """Write every speaker's utterances, `seconds` in total; return the length of each file in seconds."""
    synthesizer = Synthesizer()
    lengths: dict[Path, float] = {}
    done = 0.0
    for index, voice in enumerate(VOICES):
        share_ends = seconds * (index + 1) / len(VOICES)
        for number, waveform in enumerate(_utterances(synthesizer, voice, np.random.default_rng([seed, index]))):
            path = folder / voice.name / f"{voice.name}_{number:03d}.flac"
            lengths[path] = write_flac(path, waveform)
            done += lengths[path]
            progress(min(int(done), int(seconds)), int(seconds))
            if done >= share_ends:
                break
    return lengths


def _utterances(synthesizer: Synthesizer, voice: Voice, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Yield endless utterances in the language of `voice`, each with its own pitch, rate and gain."""
    sentences = _shuffled(SENTENCES.get(voice.language, ENGLISH).strip().splitlines(), rng)
    while True:
        pitch, rate = voice.pitch + rng.integers(-4, 5), round(voice.rate * rng.uniform(0.93, 1.07))
        tuned = replace(voice, pitch=int(pitch), rate=rate)
        said = _one_utterance(synthesizer, tuned, sentences, rng)
        yield at_level(said, rng.uniform(-28, -20)) + room(rng, len(said))


def room(rng: np.random.Generator, n_samples: int) -> FloatArray:
    """Return the hiss of a quiet room. Without it, pauses are digital silence, and dither becomes audible in them."""
    return at_level(coloured(rng, n_samples, 0.5), rng.uniform(-62, -56))


def _one_utterance(
    synthesizer: Synthesizer, voice: Voice, sentences: Iterator[str], rng: np.random.Generator
) -> FloatArray:
    """Return one or several sentences with pauses between them, 2 to 8 seconds in total."""
    wanted = rng.uniform(SHORTEST, LONGEST - 2)
    said = synthesizer.speak(next(sentences), voice)
    while len(said) < wanted * SAMPLE_RATE:
        pause = np.zeros(round(rng.uniform(0.15, 0.4) * SAMPLE_RATE), np.float32)
        longer = np.concatenate([said, pause, synthesizer.speak(next(sentences), voice)])
        if len(longer) > LONGEST * SAMPLE_RATE:
            break
        said = longer
    return said


def _shuffled(items: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Yield the items in random order, endlessly, in a new order each time."""
    while True:
        for index in rng.permutation(len(items)):
            yield items[index]


def _write_noise(folder: Path, speech: Sequence[Path], seed: int) -> list[float]:
    """Write a few files of each kind of noise, 10 to 20 seconds each; return their lengths in seconds."""
    lengths = []
    for index, kind in enumerate((*NOISES, "babble")):
        rng = np.random.default_rng([seed, len(VOICES) + index])
        for number in range(NOISE_FILES_PER_KIND):
            n_samples = int(rng.integers(100, 201)) * SAMPLE_RATE // 10  # whole tenths of a second: their FFT is fast
            made = babble(rng, n_samples, speech) if kind == "babble" else NOISES[kind](rng, n_samples)
            path = folder / kind / f"{kind}_{number}.flac"
            lengths.append(write_flac(path, at_level(made, rng.uniform(-30, -22))))
    return lengths


def write_flac(path: Path, waveform: FloatArray) -> float:
    """Write 16-bit FLAC and return its length in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
    return len(waveform) / SAMPLE_RATE


def at_level(waveform: FloatArray, decibels: float) -> FloatArray:
    """Scale a waveform to a mean power of `decibels` re full scale, or less if its peak would be too high."""
    wanted = 10 ** (decibels / 20) / float(np.sqrt(np.mean(waveform**2)))
    return waveform * min(wanted, LOUDEST_PEAK / float(np.abs(waveform).max()))


def coloured(rng: np.random.Generator, n_samples: int, slope: float) -> FloatArray:
    """Return Gaussian noise whose power falls with frequency as 1 / f^slope: 0 white, 1 pink, 2 brown."""
    frequencies = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE)
    fall: FloatArray = np.maximum(frequencies, 20) ** (-slope / 2)
    return np.fft.irfft(fall * np.fft.rfft(rng.standard_normal(n_samples)), n_samples)


def hum(rng: np.random.Generator, n_samples: int) -> FloatArray:
    """Return mains hum, 50 or 60 Hz and nineteen harmonics, with a faint hiss."""
    time = np.arange(n_samples) / SAMPLE_RATE
    mains = rng.choice([50, 60]) * (1 + 0.001 * np.sin(2 * np.pi * 0.2 * time))
    phase = 2 * np.pi * np.cumsum(mains) / SAMPLE_RATE
    strengths = rng.uniform(0.3, 1, 20) / np.arange(1, 21)
    noise = 0.02 * rng.standard_normal(n_samples)
    for k, strength in enumerate(strengths, 1):
        noise += strength * np.sin(k * phase)
    return noise


def rain(rng: np.random.Generator, n_samples: int) -> FloatArray:
    """Return about 150 rain drops per second, short resonances at 1 to 6 kHz, with a faint hiss."""
    noise = 0.01 * rng.standard_normal(n_samples)
    time = np.arange(round(0.01 * SAMPLE_RATE)) / SAMPLE_RATE
    for start in rng.integers(0, n_samples - len(time), 150 * n_samples // SAMPLE_RATE):
        drop = np.exp(-time / rng.uniform(0.0005, 0.002)) * np.sin(2 * np.pi * rng.uniform(1000, 6000) * time)
        noise[start : start + len(time)] += rng.exponential(0.2) * drop
    return noise


def machine(rng: np.random.Generator, n_samples: int) -> FloatArray:
    """Return the sound of a slow motor: pink noise and a buzz that swell and fade together."""
    time = np.arange(n_samples) / SAMPLE_RATE
    swell = 1 + 0.7 * np.sin(2 * np.pi * rng.uniform(0.3, 1.5) * time + rng.uniform(0, 2 * np.pi))
    turns = np.cumsum(rng.uniform(25, 60) * (1 + 0.03 * swell)) / SAMPLE_RATE
    noise = coloured(rng, n_samples, slope=1)
    noise /= np.std(noise)
    for k in range(1, 9):
        noise += np.sin(2 * np.pi * k * turns) / k
    return swell * noise


def babble(rng: np.random.Generator, n_samples: int, speech: Sequence[Path]) -> FloatArray:
    """Return six utterances of the corpus at once, each repeated from a random point."""
    noise = np.zeros(n_samples)
    for index in rng.choice(len(speech), size=6, replace=False):
        waveform, _ = sf.read(speech[index])
        noise += np.resize(np.roll(waveform, rng.integers(len(waveform))), n_samples)
    return noise


NOISES: dict[str, Callable[[np.random.Generator, int], FloatArray]] = {
    "white": lambda rng, n_samples: coloured(rng, n_samples, slope=0),
    "pink": lambda rng, n_samples: coloured(rng, n_samples, slope=1),
    "brown": lambda rng, n_samples: coloured(rng, n_samples, slope=2),
    "hum": hum,
    "rain": rain,
    "machine": machine,
}
