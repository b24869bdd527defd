"""The eight languages of the demo: word forms, and one small grammar each that turns a fact into a sentence.

Only what the demo's sentences need is here: the present tense, definite subjects in the singular, indefinite objects,
agreement of adjectives by gender or noun class, the accusative where a language marks it, and negation. Words are
listed in the form in which they are used, so that nothing has to be derived by rules that have exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ltp_sparse.tasks.generated.facts import Fact


@dataclass(frozen=True)
class Language:
    """Word forms by concept, and the grammar.

    Attributes:
        agents, things: concept -> noun, with gender or noun class where the grammar needs one
        properties: property -> forms
        actions: action -> (affirmed, denied)
        places, times: concept -> the whole phrase
        clause: (language, fact) -> the sentence without capital and full stop
        answers: label -> the word that answers "is that so?"
        asked: frames of a question and its answer, of {hypothesis} and {answer}
    """

    agents: Mapping[str, tuple[str, ...]]
    things: Mapping[str, tuple[str, ...]]
    properties: Mapping[str, tuple[str, ...]]
    actions: Mapping[str, tuple[str, ...]]
    places: Mapping[str, str]
    times: Mapping[str, str]
    clause: Callable[[Language, Fact], str]
    answers: Mapping[str, str]
    asked: tuple[str, ...]

    def action(self, fact: Fact) -> str:
        return self.actions[fact.action][fact.negated]


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Lines of `concept: form | form | ...`."""
    rows = (line.split(":", 1) for line in text.strip().splitlines())
    return {concept.strip(): tuple(form.strip() for form in forms.split("|")) for concept, forms in rows}


def _phrases(text: str) -> dict[str, str]:
    return {concept: forms[0] for concept, forms in _table(text).items()}


def _answers(right: str, wrong: str, maybe: str) -> dict[str, str]:
    return {"entailment": right, "contradiction": wrong, "neutral": maybe}


def _join(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _place(language: Language, fact: Fact) -> str | None:
    return fact.place and language.places[fact.place]


def _time(language: Language, fact: Fact) -> str | None:
    return fact.time and language.times[fact.time]


def _circumstances(language: Language, fact: Fact, clause: str, comma: str = "") -> str:
    """Place and time after the clause, or the time before it."""
    place, time = _place(language, fact), _time(language, fact)
    return _join(f"{time}{comma}", clause, place) if fact.fronted else _join(clause, place, time)


def _english(language: Language, fact: Fact) -> str:
    subject = _join("the", fact.quality, language.agents[fact.agent][0])
    thing = fact.thing and _join(fact.attribute, language.things[fact.thing][0])
    article = thing and ("an" if thing[0] in "aeiou" else "a")
    return _circumstances(language, fact, _join(subject, language.action(fact), article, thing))


ENGLISH = Language(
    agents={
        name: (name,) for name in ("man", "woman", "boy", "girl", "child", "person", "dog", "cat", "horse", "animal")
    },
    things={
        name: (name,)
        for name in (
            "apple",
            "banana",
            "lemon",
            "fruit",
            "rose",
            "lily",
            "flower",
            "ball",
            "doll",
            "toy",
            "hammer",
            "saw",
            "knife",
            "tool",
        )
    },  # fmt: skip
    properties={},
    actions=_table("""
        sleep: sleeps | does not sleep
        eat: eats | does not eat
        read: reads | does not read
        run: runs | does not run
        work: works | does not work
        play: plays | does not play
        find: finds
        lose: loses
        hide: hides
        show: shows
        buy: buys
        sell: sells
        break: breaks
        repair: repairs
    """),
    places=_phrases("""
        kitchen: in the kitchen
        bedroom: in the bedroom
        living room: in the living room
        house: in the house
        garden: in the garden
        forest: in the forest
        beach: on the beach
        field: in the field
        outside: outside
    """),
    times=_phrases("""
        morning: in the morning
        noon: at noon
        night: at night
    """),
    clause=_english,
    answers=_answers("right", "wrong", "maybe"),
    asked=("{hypothesis}? {answer}.", "{hypothesis}? I say: {answer}.", "Question: {hypothesis}? Answer: {answer}."),
)


_GERMAN_ARTICLES = {"m": ("der", "einen", "en"), "f": ("die", "eine", "e"), "n": ("das", "ein", "es")}


def _german(language: Language, fact: Fact) -> str:
    noun, gender = language.agents[fact.agent]
    # After the definite article every adjective of a singular subject ends in -e.
    quality = fact.quality and language.properties[fact.quality][0] + "e"
    subject = _join(_GERMAN_ARTICLES[gender][0], quality, noun)
    thing = None
    if fact.thing:
        noun, gender = language.things[fact.thing]
        _, article, ending = _GERMAN_ARTICLES[gender]  # accusative, mixed declension
        thing = _join(article, fact.attribute and language.properties[fact.attribute][0] + ending, noun)
    verb, place, time = language.action(fact), _place(language, fact), _time(language, fact)
    negation = "nicht" if fact.negated else None
    if fact.fronted:  # the verb stays second
        return _join(time, verb, subject, negation, place, thing)
    return _join(subject, verb, time, negation, place, thing)


GERMAN = Language(
    agents=_table("""
        man: Mann | m
        woman: Frau | f
        boy: Junge | m
        girl: Mädchen | n
        child: Kind | n
        person: Person | f
        dog: Hund | m
        cat: Katze | f
        horse: Pferd | n
        animal: Tier | n
    """),
    things=_table("""
        apple: Apfel | m
        banana: Banane | f
        lemon: Zitrone | f
        fruit: Frucht | f
        rose: Rose | f
        lily: Lilie | f
        flower: Blume | f
        ball: Ball | m
        doll: Puppe | f
        toy: Spielzeug | n
        hammer: Hammer | m
        saw: Säge | f
        knife: Messer | n
        tool: Werkzeug | n
    """),
    properties=_table("""
        big: groß
        small: klein
        happy: glücklich
        sad: traurig
        red: rot
        white: weiß
        black: schwarz
        new: neu
        old: alt
    """),
    actions=_table("""
        sleep: schläft | schläft
        eat: isst | isst
        read: liest | liest
        run: rennt | rennt
        work: arbeitet | arbeitet
        play: spielt | spielt
        find: findet
        lose: verliert
        hide: versteckt
        show: zeigt
        buy: kauft
        sell: verkauft
        break: zerbricht
        repair: repariert
    """),
    places=_phrases("""
        kitchen: in der Küche
        bedroom: im Schlafzimmer
        living room: im Wohnzimmer
        house: im Haus
        garden: im Garten
        forest: im Wald
        beach: am Strand
        field: auf dem Feld
        outside: draußen
    """),
    times=_phrases("""
        morning: am Morgen
        noon: am Mittag
        night: in der Nacht
    """),
    clause=_german,
    answers=_answers("ja", "nein", "vielleicht"),
    asked=("{hypothesis}? {answer}.", "{hypothesis}? Ich sage: {answer}.", "Frage: {hypothesis}? Antwort: {answer}."),
)


_FRENCH_BEFORE_NOUN = ("big", "small", "new", "old")


def _french_noun_phrase(language: Language, article: str, entry: tuple[str, ...], name: str | None) -> str:
    """article: "le" (definite) or "un" (indefinite), in the gender of the noun, elided where it must be."""
    noun, gender = entry
    vowel = noun[0] in "aeiouéh"  # no noun here has an aspirated h
    before = after = None
    if name:
        masculine, feminine, masculine_before_vowel = language.properties[name]
        form = feminine if gender == "f" else masculine_before_vowel if vowel else masculine
        before, after = (form, None) if name in _FRENCH_BEFORE_NOUN else (None, form)
    if article == "un":
        return _join("un" if gender == "m" else "une", before, noun, after)
    if vowel and not before:
        return _join("l'" + noun, after)
    return _join("le" if gender == "m" else "la", before, noun, after)


def _french(language: Language, fact: Fact) -> str:
    subject = _french_noun_phrase(language, "le", language.agents[fact.agent], fact.quality)
    thing = None
    if fact.thing:
        thing = _french_noun_phrase(language, "un", language.things[fact.thing], fact.attribute)
    return _circumstances(language, fact, _join(subject, language.action(fact), thing), ",")


FRENCH = Language(
    agents=_table("""
        man: homme | m
        woman: femme | f
        boy: garçon | m
        girl: fille | f
        child: enfant | m
        person: personne | f
        dog: chien | m
        cat: chat | m
        horse: cheval | m
        animal: animal | m
    """),
    things=_table("""
        apple: pomme | f
        banana: banane | f
        lemon: citron | m
        fruit: fruit | m
        rose: rose | f
        lily: lys | m
        flower: fleur | f
        ball: ballon | m
        doll: poupée | f
        toy: jouet | m
        hammer: marteau | m
        saw: scie | f
        knife: couteau | m
        tool: outil | m
    """),
    properties=_table("""
        big: grand | grande | grand
        small: petit | petite | petit
        happy: heureux | heureuse | heureux
        sad: triste | triste | triste
        red: rouge | rouge | rouge
        white: blanc | blanche | blanc
        black: noir | noire | noir
        new: nouveau | nouvelle | nouvel
        old: vieux | vieille | vieil
    """),
    actions=_table("""
        sleep: dort | ne dort pas
        eat: mange | ne mange pas
        read: lit | ne lit pas
        run: court | ne court pas
        work: travaille | ne travaille pas
        play: joue | ne joue pas
        find: trouve
        lose: perd
        hide: cache
        show: montre
        buy: achète
        sell: vend
        break: casse
        repair: répare
    """),
    places=_phrases("""
        kitchen: dans la cuisine
        bedroom: dans la chambre
        living room: dans le salon
        house: dans la maison
        garden: dans le jardin
        forest: dans la forêt
        beach: sur la plage
        field: dans le champ
        outside: dehors
    """),
    times=_phrases("""
        morning: le matin
        noon: à midi
        night: la nuit
    """),
    clause=_french,
    answers=_answers("oui", "non", "possible"),
    asked=(
        "{hypothesis} ? {answer}.",
        "{hypothesis} ? Je dis : {answer}.",
        "Question : {hypothesis} ? Réponse : {answer}.",
    ),
)


def _spanish(language: Language, fact: Fact) -> str:
    def phrase(articles: tuple[str, str], entry: tuple[str, ...], name: str | None) -> str:
        noun, gender = entry
        feminine = gender == "f"
        return _join(articles[feminine], noun, name and language.properties[name][feminine])

    subject = phrase(("el", "la"), language.agents[fact.agent], fact.quality)
    thing = phrase(("un", "una"), language.things[fact.thing], fact.attribute) if fact.thing else None
    return _circumstances(language, fact, _join(subject, language.action(fact), thing))


SPANISH = Language(
    agents=_table("""
        man: hombre | m
        woman: mujer | f
        boy: chico | m
        girl: chica | f
        child: niño | m
        person: persona | f
        dog: perro | m
        cat: gato | m
        horse: caballo | m
        animal: animal | m
    """),
    things=_table("""
        apple: manzana | f
        banana: plátano | m
        lemon: limón | m
        fruit: fruta | f
        rose: rosa | f
        lily: lirio | m
        flower: flor | f
        ball: pelota | f
        doll: muñeca | f
        toy: juguete | m
        hammer: martillo | m
        saw: sierra | f
        knife: cuchillo | m
        tool: herramienta | f
    """),
    properties=_table("""
        big: grande | grande
        small: pequeño | pequeña
        happy: feliz | feliz
        sad: triste | triste
        red: rojo | roja
        white: blanco | blanca
        black: negro | negra
        new: nuevo | nueva
        old: viejo | vieja
    """),
    actions=_table("""
        sleep: duerme | no duerme
        eat: come | no come
        read: lee | no lee
        run: corre | no corre
        work: trabaja | no trabaja
        play: juega | no juega
        find: encuentra
        lose: pierde
        hide: esconde
        show: muestra
        buy: compra
        sell: vende
        break: rompe
        repair: repara
    """),
    places=_phrases("""
        kitchen: en la cocina
        bedroom: en el dormitorio
        living room: en la sala
        house: en la casa
        garden: en el jardín
        forest: en el bosque
        beach: en la playa
        field: en el campo
        outside: afuera
    """),
    times=_phrases("""
        morning: por la mañana
        noon: al mediodía
        night: por la noche
    """),
    clause=_spanish,
    answers=_answers("sí", "no", "talvez"),
    asked=(
        "¿{hypothesis}? {answer}.",
        "¿{hypothesis}? Yo digo: {answer}.",
        "Pregunta: ¿{hypothesis}? Respuesta: {answer}.",
    ),
)


_RUSSIAN_NOMINATIVE = {"m": 0, "f": 1, "n": 3}
_RUSSIAN_ACCUSATIVE = {"m": 0, "f": 2, "n": 3}  # of inanimate nouns


def _russian(language: Language, fact: Fact) -> str:
    noun, gender = language.agents[fact.agent]
    subject = _join(fact.quality and language.properties[fact.quality][_RUSSIAN_NOMINATIVE[gender]], noun)
    thing = None
    if fact.thing:
        noun, gender = language.things[fact.thing]
        thing = _join(fact.attribute and language.properties[fact.attribute][_RUSSIAN_ACCUSATIVE[gender]], noun)
    verb, place, time = language.action(fact), _place(language, fact), _time(language, fact)
    if fact.fronted:
        return _join(time, subject, verb, place, thing)
    return _join(subject, time, verb, place, thing)


RUSSIAN = Language(
    agents=_table("""
        man: мужчина | m
        woman: женщина | f
        boy: мальчик | m
        girl: девочка | f
        child: ребёнок | m
        person: человек | m
        dog: собака | f
        cat: кошка | f
        horse: лошадь | f
        animal: животное | n
    """),
    things=_table("""
        apple: яблоко | n
        banana: банан | m
        lemon: лимон | m
        fruit: фрукт | m
        rose: розу | f
        lily: лилию | f
        flower: цветок | m
        ball: мяч | m
        doll: куклу | f
        toy: игрушку | f
        hammer: молоток | m
        saw: пилу | f
        knife: нож | m
        tool: инструмент | m
    """),
    properties=_table("""
        big: большой | большая | большую | большое
        small: маленький | маленькая | маленькую | маленькое
        happy: счастливый | счастливая | счастливую | счастливое
        sad: грустный | грустная | грустную | грустное
        red: красный | красная | красную | красное
        white: белый | белая | белую | белое
        black: чёрный | чёрная | чёрную | чёрное
        new: новый | новая | новую | новое
        old: старый | старая | старую | старое
    """),
    actions=_table("""
        sleep: спит | не спит
        eat: ест | не ест
        read: читает | не читает
        run: бегает | не бегает
        work: работает | не работает
        play: играет | не играет
        find: находит
        lose: теряет
        hide: прячет
        show: показывает
        buy: покупает
        sell: продаёт
        break: ломает
        repair: чинит
    """),
    places=_phrases("""
        kitchen: на кухне
        bedroom: в спальне
        living room: в гостиной
        house: в доме
        garden: в саду
        forest: в лесу
        beach: на пляже
        field: в поле
        outside: на улице
    """),
    times=_phrases("""
        morning: утром
        noon: в полдень
        night: ночью
    """),
    clause=_russian,
    answers=_answers("да", "нет", "возможно"),
    asked=("{hypothesis}? {answer}.", "{hypothesis}? Я говорю: {answer}.", "Вопрос: {hypothesis}? Ответ: {answer}."),
)


def _turkish(language: Language, fact: Fact) -> str:
    subject = _join(fact.quality and language.properties[fact.quality][0], language.agents[fact.agent][0])
    thing = None
    if fact.thing:
        thing = _join(fact.attribute and language.properties[fact.attribute][0], "bir", language.things[fact.thing][0])
    place, time = _place(language, fact), _time(language, fact)
    opening = _join(time, subject) if fact.fronted else _join(subject, time)
    return _join(opening, place, thing, language.action(fact))


TURKISH = Language(
    agents=_table("""
        man: adam
        woman: kadın
        boy: oğlan
        girl: kız
        child: çocuk
        person: kişi
        dog: köpek
        cat: kedi
        horse: at
        animal: hayvan
    """),
    things=_table("""
        apple: elma
        banana: muz
        lemon: limon
        fruit: meyve
        rose: gül
        lily: zambak
        flower: çiçek
        ball: top
        doll: bebek
        toy: oyuncak
        hammer: çekiç
        saw: testere
        knife: bıçak
        tool: alet
    """),
    properties=_table("""
        big: büyük
        small: küçük
        happy: mutlu
        sad: üzgün
        red: kırmızı
        white: beyaz
        black: siyah
        new: yeni
        old: eski
    """),
    actions=_table("""
        sleep: uyuyor | uyumuyor
        eat: yemek yiyor | yemek yemiyor
        read: kitap okuyor | kitap okumuyor
        run: koşuyor | koşmuyor
        work: çalışıyor | çalışmıyor
        play: oynuyor | oynamıyor
        find: buluyor
        lose: kaybediyor
        hide: saklıyor
        show: gösteriyor
        buy: satın alıyor
        sell: satıyor
        break: kırıyor
        repair: onarıyor
    """),
    places=_phrases("""
        kitchen: mutfakta
        bedroom: yatak odasında
        living room: salonda
        house: evde
        garden: bahçede
        forest: ormanda
        beach: plajda
        field: tarlada
        outside: dışarıda
    """),
    times=_phrases("""
        morning: sabah
        noon: öğlen
        night: gece
    """),
    clause=_turkish,
    answers=_answers("evet", "hayır", "belki"),
    asked=("{hypothesis}? {answer}.", "{hypothesis}? Bence: {answer}.", "Soru: {hypothesis}? Cevap: {answer}."),
)


def _swahili(language: Language, fact: Fact) -> str:
    # Living beings agree in class 1, things in their own class (3, 5, 7, 9); a doll counts as a living being.
    def phrase(entry: tuple[str, ...], name: str | None) -> str:
        noun, noun_class = entry
        return _join(noun, name and language.properties[name][_SWAHILI_CLASSES.index(noun_class)])

    subject = phrase((language.agents[fact.agent][0], "1"), fact.quality)
    thing = phrase(language.things[fact.thing], fact.attribute) if fact.thing else None
    return _circumstances(language, fact, _join(subject, language.action(fact), thing))


_SWAHILI_CLASSES = ("1", "3", "5", "7", "9")

SWAHILI = Language(
    agents=_table("""
        man: mwanamume
        woman: mwanamke
        boy: mvulana
        girl: msichana
        child: mtoto
        person: mtu
        dog: mbwa
        cat: paka
        horse: farasi
        animal: mnyama
    """),
    things=_table("""
        apple: tofaa | 5
        banana: ndizi | 9
        lemon: limau | 5
        fruit: tunda | 5
        rose: waridi | 5
        lily: yungiyungi | 5
        flower: ua | 5
        ball: mpira | 3
        doll: mwanasesere | 1
        toy: kichezeo | 7
        hammer: nyundo | 9
        saw: msumeno | 3
        knife: kisu | 7
        tool: zana | 9
    """),
    properties=_table("""
        big: mkubwa | mkubwa | kubwa | kikubwa | kubwa
        small: mdogo | mdogo | dogo | kidogo | ndogo
        happy: mwenye furaha
        sad: mwenye huzuni
        red: mwekundu | mwekundu | jekundu | chekundu | nyekundu
        white: mweupe | mweupe | jeupe | cheupe | nyeupe
        black: mweusi | mweusi | jeusi | cheusi | nyeusi
        new: mpya | mpya | jipya | kipya | mpya
        old: wa zamani | wa zamani | la zamani | cha zamani | ya zamani
    """),
    actions=_table("""
        sleep: analala | halali
        eat: anakula | hali
        read: anasoma | hasomi
        run: anakimbia | hakimbii
        work: anafanya kazi | hafanyi kazi
        play: anacheza | hachezi
        find: anapata
        lose: anapoteza
        hide: anaficha
        show: anaonyesha
        buy: ananunua
        sell: anauza
        break: anavunja
        repair: anarekebisha
    """),
    places=_phrases("""
        kitchen: jikoni
        bedroom: chumbani
        living room: sebuleni
        house: nyumbani
        garden: bustanini
        forest: msituni
        beach: ufukweni
        field: shambani
        outside: nje
    """),
    times=_phrases("""
        morning: asubuhi
        noon: mchana
        night: usiku
    """),
    clause=_swahili,
    answers=_answers("ndio", "hapana", "labda"),
    asked=("{hypothesis}? {answer}.", "{hypothesis}? Nasema: {answer}.", "Swali: {hypothesis}? Jibu: {answer}."),
)


def _indonesian(language: Language, fact: Fact) -> str:
    subject = _join(language.agents[fact.agent][0], fact.quality and language.properties[fact.quality][0], "itu")
    thing = None
    if fact.thing:
        thing = _join(language.things[fact.thing][0], fact.attribute and language.properties[fact.attribute][0])
    return _circumstances(language, fact, _join(subject, language.action(fact), thing))


INDONESIAN = Language(
    agents=_table("""
        man: pria
        woman: wanita
        boy: anak laki-laki
        girl: anak perempuan
        child: anak
        person: orang
        dog: anjing
        cat: kucing
        horse: kuda
        animal: hewan
    """),
    things=_table("""
        apple: apel
        banana: pisang
        lemon: lemon
        fruit: buah
        rose: mawar
        lily: lili
        flower: bunga
        ball: bola
        doll: boneka
        toy: mainan
        hammer: palu
        saw: gergaji
        knife: pisau
        tool: alat
    """),
    properties=_table("""
        big: besar
        small: kecil
        happy: yang bahagia
        sad: yang sedih
        red: merah
        white: putih
        black: hitam
        new: baru
        old: lama
    """),
    actions=_table("""
        sleep: tidur | tidak tidur
        eat: makan | tidak makan
        read: membaca | tidak membaca
        run: berlari | tidak berlari
        work: bekerja | tidak bekerja
        play: bermain | tidak bermain
        find: menemukan
        lose: kehilangan
        hide: menyembunyikan
        show: memperlihatkan
        buy: membeli
        sell: menjual
        break: merusak
        repair: memperbaiki
    """),
    places=_phrases("""
        kitchen: di dapur
        bedroom: di kamar tidur
        living room: di ruang tamu
        house: di rumah
        garden: di kebun
        forest: di hutan
        beach: di pantai
        field: di ladang
        outside: di luar
    """),
    times=_phrases("""
        morning: pada pagi hari
        noon: pada siang hari
        night: pada malam hari
    """),
    clause=_indonesian,
    answers=_answers("benar", "salah", "mungkin"),
    asked=(
        "{hypothesis}? {answer}.",
        "{hypothesis}? Menurut saya: {answer}.",
        "Pertanyaan: {hypothesis}? Jawaban: {answer}.",
    ),
)

LANGUAGES: dict[str, Language] = {
    "en": ENGLISH, "de": GERMAN, "fr": FRENCH, "es": SPANISH, "ru": RUSSIAN, "tr": TURKISH, "sw": SWAHILI,
    "id": INDONESIAN,
}  # fmt: skip


def clause(fact: Fact, language: str) -> str:
    """The fact in a language, without capital letter and full stop."""
    grammar = LANGUAGES[language]
    return grammar.clause(grammar, fact)


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(fact: Fact, language: str) -> str:
    """The fact as a sentence."""
    return capitalised(clause(fact, language)) + "."
