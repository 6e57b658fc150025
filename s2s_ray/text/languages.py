"""Languages by name: what a family puts around a text so that the model knows the source and the target language.

Every multilingual family says it in its own way. `Languages` knows the codes of one preset and its family's way, and
turns a pair such as ("en", "de") into a `Route`. The conventions, X being the text's own tokens:

    convention    source            labels            generation starts with        presets
    source_first  [source] X </s>   [target] X </s>   forced first token [target]   M2M100, NLLB, mBART-50
    source_last   X </s> [source]   X </s> [target]   forced first token [target]   NLLB in its legacy order
    start_token   X </s> [source]   X </s> [target]   start token [target]          mBART-25
    target_token  [target] X        as ever           as ever                       Marian, any with `>>de<<`
    template      a prompt, X       as ever           as ever                       T5, MADLAD-400
    fixed         as ever           as ever           as ever                       Marian of one pair

A preset of any family whose vocabulary has tokens such as `>>de<<` follows `target_token`. `preprocessor.json` can say
it all explicitly, and wins: `{"languages": {"convention": "target_token", "tokens": {"de": ">>de<<"}}}`, for
`template` with `"template": "translate {source} to {target}: "` and names in place of tokens. `"sources"` may list the
source languages where the tokens do not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2s_ray.errors import LanguageError, PresetError
from s2s_ray.text.tokenizer import Tokenizer

CONVENTIONS = ("source_first", "source_last", "start_token", "target_token", "template", "fixed")
Ids = tuple[int, ...]

# The group is the code that a language token stands for. Families in whose vocabulary they are looked up; None: all.
_TOKENS: tuple[tuple[str | None, str], ...] = (
    ("m2m_100", r"__([a-z]{2,3})__"),
    ("m2m_100", r"([a-z]{3}_[A-Z][a-z]{3})"),
    ("mbart", r"([a-z]{2}_[A-Z]{2})"),
    ("t5", r"<2([a-z]{2,3}(?:_[A-Z][a-z]{3})?)>"),
    (None, r">>([A-Za-z][A-Za-z_-]{1,15})<<"),
)
_MBART_25_LANGUAGES = 25  # mBART-50 has twice as many
_T5_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")
_T5_PREFIX = re.compile(r"translate (\w+) to (\w+): ")

# ISO 639-1 codes with the ISO 639-3 codes that NLLB-200 and Opus-MT use for them, macrolanguage and individual ones.
_ISO_639 = """aa aar;ab abk;af afr;ak aka,twi;am amh;an arg;ar ara,arb;as asm;av ava;ay aym,ayr;az aze,azj;ba bak
be bel;bg bul;bh bih;bi bis;bm bam;bn ben;bo bod;br bre;bs bos;ca cat;ce che;co cos;cs ces;cv chv;cy cym;da dan;de deu
dv div;dz dzo;ee ewe;el ell;en eng;eo epo;es spa;et est,ekk;eu eus;fa fas,pes;ff ful,fuv;fi fin;fj fij;fo fao;fr fra
fy fry;ga gle;gd gla;gl glg;gn grn;gu guj;gv glv;ha hau;he heb;hi hin;hr hrv;ht hat;hu hun;hy hye;ia ina;id ind;ie ile
ig ibo;io ido;is isl;it ita;iu iku;ja jpn;jv jav;ka kat;kg kon;ki kik;kk kaz;kl kal;km khm;kn kan;ko kor;kr kau;ks kas
ku kur,kmr;kv kom;kw cor;ky kir;la lat;lb ltz;lg lug;li lim;ln lin;lo lao;lt lit;lu lub;lv lav,lvs;mg mlg,plt;mh mah
mi mri;mk mkd;ml mal;mn mon,khk;mr mar;ms msa,zsm,zlm;mt mlt;my mya;na nau;nb nob;nd nde;ne nep,npi;nl nld;nn nno
no nor,nob;nr nbl;nv nav;ny nya;oc oci;oj oji;om orm,gaz;or ori,ory;os oss;pa pan;pi pli;pl pol;ps pus,pbt;pt por
qu que,quy;rm roh;rn run;ro ron;ru rus;rw kin;sa san;sc srd;sd snd;se sme;sg sag;sh hbs;si sin;sk slk;sl slv;sm smo
sn sna;so som;sq sqi,als;sr srp;ss ssw;st sot;su sun;sv swe;sw swa,swh;ta tam;te tel;tg tgk;th tha;ti tir;tk tuk
tl tgl;tn tsn;to ton;tr tur;ts tso;tt tat;ty tah;ug uig;uk ukr;ur urd;uz uzb,uzn;ve ven;vi vie;vo vol;wa wln;wo wol
xh xho;yi yid,ydd;yo yor;za zha;zh zho,cmn;zu zul"""
_ISO = {two: three.split(",") for two, three in (line.split() for line in re.split(r"[;\n]", _ISO_639))}
_ISO_REVERSE = {three: two for two, threes in _ISO.items() for three in threes}


def language_code(token: str) -> str | None:
    """The code that a token in some family's form for languages stands for; None for other tokens."""
    found = (re.fullmatch(pattern, token) for _, pattern in _TOKENS)
    return next((match[1] for match in found if match), None)


@dataclass(frozen=True, slots=True)
class Route:
    """How texts of one pair of languages are written for a model.

    `text_prefix` stands before the source text. A pair of ids (before, after) wraps the source's and the target's
    tokens; None leaves the tokenizer's own wrapping. The first decoder tokens are None where they are the preset's.
    `error` says why there is no route.
    """

    text_prefix: str | None = None
    source_wrap: tuple[Ids, Ids] | None = None
    target_wrap: tuple[Ids, Ids] | None = None
    forced_bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    error: str = ""

    def generation_changes(self) -> dict[str, int]:
        """The fields of `GenerationSettings` that a row of this pair has values of its own for."""
        values = {
            "forced_bos_token_id": self.forced_bos_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
        }
        return {name: value for name, value in values.items() if value is not None}


NO_ROUTE = Route()


@dataclass(slots=True)
class Languages:
    """The languages of one preset. `tokens` maps each code to its token (convention `template`: to its name).

    `sources` lists the source languages where the model is not told the source; None: any is accepted. Raises
    PresetError for a table that contradicts itself or names tokens that the vocabulary lacks.
    """

    tokenizer: Tokenizer
    convention: str
    tokens: Mapping[str, str]
    template: str = ""
    sources: Sequence[str] | None = None
    _routes: dict[tuple[str | None, str | None], Route] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise PresetError(
                f"languages.convention must be one of {', '.join(CONVENTIONS)}. Received: {self.convention!r}"
            )
        strings = isinstance(self.tokens, Mapping) and all(isinstance(v, str) for kv in self.tokens.items() for v in kv)
        if not strings or not self.tokens:
            raise PresetError(f"languages.tokens must map codes to tokens. Received: {self.tokens!r:.200}")
        if not isinstance(self.template, str) or (self.convention == "template") != bool(self.template):
            raise PresetError(f'a template belongs to the convention "template" alone. Received: {self.template!r}')
        if self.sources is not None and not all(isinstance(code, str) for code in self.sources):
            raise PresetError(f"languages.sources must be a list of codes. Received: {self.sources!r:.200}")
        if self.convention not in ("template", "fixed"):
            vocabulary = self.tokenizer.vocabulary()
            missing = sorted(token for token in self.tokens.values() if token not in vocabulary)
            if missing:
                raise PresetError(f"the vocabulary must hold every language token. Missing: {', '.join(missing[:9])}")

    @classmethod
    def of_preset(
        cls,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        tokenizer_config: Mapping[str, Any],
        declared: Any = None,
    ) -> "Languages | None":
        """From what `preprocessor.json` declares, else from the vocabulary and the family's convention, else None."""
        if declared is not None:
            known = {"convention", "tokens", "template", "sources"}
            if not isinstance(declared, Mapping) or not set(declared) <= known or "tokens" not in declared:
                raise PresetError(
                    f"languages must hold tokens, and of {sorted(known)} only. Received: {declared!r:.200}"
                )
            return cls(tokenizer, **{"convention": "target_token", **declared})
        family = config.get("model_type")
        for of_family, pattern in _TOKENS:
            tokens = _matching(tokenizer, pattern) if of_family in (None, family) else {}
            if tokens:
                template = "{target} " if family == "t5" and of_family == "t5" else ""
                return cls(tokenizer, _convention(family, of_family, tokens, tokenizer_config), tokens, template)
        if family == "t5":
            return cls._of_t5(tokenizer, config)
        source, target = (tokenizer_config.get(f"{side}_lang") for side in ("source", "target"))
        if family == "marian" and isinstance(source, str) and isinstance(target, str):
            return cls(tokenizer, "fixed", {target: target}, sources=[source])
        return None

    @classmethod
    def _of_t5(cls, tokenizer: Tokenizer, config: Mapping[str, Any]) -> "Languages | None":
        """T5 1.0 and Flan-T5 list the pairs of their multi-task training in config.json; T5 1.1 and ByT5 have none."""
        names: dict[str, str] = {}
        tasks = config.get("task_specific_params")
        for task, values in tasks.items() if isinstance(tasks, Mapping) else ():
            prefix = values.get("prefix") if isinstance(values, Mapping) else None
            pair, said = _T5_PAIR.fullmatch(task), _T5_PREFIX.fullmatch(prefix if isinstance(prefix, str) else "")
            if pair and said:
                names |= dict(zip(pair.groups(), said.groups(), strict=True))
        return cls(tokenizer, "template", names, "translate {source} to {target}: ") if names else None

    def to_config(self) -> dict[str, Any]:
        """What `preprocessor.json` holds for it."""
        config: dict[str, Any] = {"convention": self.convention, "tokens": dict(self.tokens)}
        if self.template:
            config["template"] = self.template
        return config if self.sources is None else config | {"sources": list(self.sources)}

    def route(self, source: str | None, target: str | None) -> Route:
        """Raises LanguageError for a code the preset does not know, and where its convention needs one more."""
        key = source, target
        if key not in self._routes:
            self._routes[key] = self._make(source, target)
        return self._routes[key]

    def _make(self, source: str | None, target: str | None) -> Route:
        tells_source = self.convention in ("source_first", "source_last", "start_token") or "{source}" in self.template
        known_sources = self.tokens if tells_source else self.sources
        source = source if source is None or known_sources is None else resolve("source_lang", source, known_sources)
        target = None if target is None else resolve("target_lang", target, self.tokens)
        if self.convention == "template":
            return Route(text_prefix=self._text(source, target))
        if self.convention == "fixed":
            return NO_ROUTE
        first, last = tuple(self.tokenizer.prefix_ids), tuple(self.tokenizer.suffix_ids)
        if self.convention == "target_token":
            return Route(source_wrap=((*first, self._id(target)), last)) if target else NO_ROUTE
        source_wrap, target_wrap = (self._wrap(code) for code in (source, target))
        chosen = None if target is None else self._id(target)
        if self.convention == "start_token":
            return Route(None, source_wrap, target_wrap, decoder_start_token_id=chosen)
        return Route(None, source_wrap, target_wrap, forced_bos_token_id=chosen)

    def _wrap(self, code: str | None) -> tuple[Ids, Ids] | None:
        if code is None:
            return None
        token, end = self._id(code), self.tokenizer.end_token_id
        return ((token,), (end,)) if self.convention == "source_first" else ((), (end, token))

    def _id(self, code: str) -> int:
        return self.tokenizer.token_to_id(self.tokens[code])

    def _text(self, source: str | None, target: str | None) -> str:
        text = self.template
        for side, code in (("source", source), ("target", target)):
            if f"{{{side}}}" in text:
                if code is None:
                    raise LanguageError(
                        f"{side}_lang must be given too: this preset's prompt is {self.template!r}. "
                        f"Known: {', '.join(sorted(self.tokens))}"
                    )
                text = text.replace(f"{{{side}}}", self.tokens[code])
        return text


def resolve(name: str, code: Any, known: Mapping[str, str] | Sequence[str]) -> str:
    """The preset's own code for a language given by that code, by its token, or by an ISO 639 code that fits only one.

    Raises LanguageError, which lists the known codes, or those of several that fit.
    """
    if isinstance(code, str):
        if code in known:
            return code
        if isinstance(known, Mapping) and code in known.values():
            return next(key for key, token in known.items() if token == code)
        wanted = _equivalents(code)
        fitting = [key for key in known if wanted & _equivalents(re.split("[_-]", key)[0])]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise LanguageError(f"{name} {code!r} fits several languages of this preset: {', '.join(sorted(fitting))}")
    raise LanguageError(
        f"{name} must be a language of this preset. Received: {code!r}. Known: {', '.join(sorted(known))}"
    )


def _equivalents(code: str) -> set[str]:
    code = code.lower()
    return {code, *_ISO.get(code, ()), _ISO_REVERSE.get(code, code)}


def _matching(tokenizer: Tokenizer, pattern: str) -> dict[str, str]:
    compiled = re.compile(pattern)
    matches = (compiled.fullmatch(token) for token in tokenizer.vocabulary())
    return {match[1]: match[0] for match in matches if match}


def _convention(
    family: Any, of_family: str | None, tokens: Mapping[str, str], tokenizer_config: Mapping[str, Any]
) -> str:
    if of_family is None:
        return "target_token"
    if family == "t5":
        return "template"
    if family == "m2m_100":
        return "source_last" if tokenizer_config.get("legacy_behaviour") is True else "source_first"
    is_mbart50 = str(tokenizer_config.get("tokenizer_class")).startswith("MBart50")
    return "source_first" if is_mbart50 or len(tokens) > _MBART_25_LANGUAGES else "start_token"
