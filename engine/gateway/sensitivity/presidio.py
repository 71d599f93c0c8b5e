"""Microsoft Presidio as a second opinion: it knows names and places where a spaCy model is installed.

It costs about a thousand times what the fast path does, so it is asked only where the configuration says so, in a
thread of its own, and what it said about a text is remembered.
"""

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenmill.engine.gateway.sensitivity.scanner import Finding
from tokenmill.engine.gateway.sensitivity.settings import PresidioSettings
from tokenmill.errors import ConfigurationError, MissingDependencyError

#: Presidio's names of entities as kinds of ours.
_KINDS = {
    "PERSON": "name",
    "LOCATION": "location",
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "IP_ADDRESS": "ip_address",
    "CREDIT_CARD": "credit_card",
    "IBAN_CODE": "iban",
    "US_SSN": "us_ssn",
    "US_ITIN": "us_itin",
    "US_PASSPORT": "passport",
    "UK_NHS": "uk_nhs",
    "UK_NINO": "uk_nino",
    "ES_NIF": "es_nif",
    "IT_FISCAL_CODE": "it_codice_fiscale",
    "PL_PESEL": "pl_pesel",
    "IN_AADHAAR": "in_aadhaar",
}
#: Texts remembered.
_MAX_ENTRIES = 4096


class Presidio:
    """Presidio's analyzer.

    Args:
        settings: What to ask it for.

    Raises:
        MissingDependencyError: It is not installed.
        ConfigurationError: The spaCy model is not.
    """

    def __init__(self, settings: PresidioSettings) -> None:
        self._settings = settings
        self._analyzer = _analyzer(settings)
        self._thread = ThreadPoolExecutor(1, "presidio")
        self._seen: dict[bytes, tuple[Finding, ...]] = {}

    async def find(self, text: str) -> tuple[Finding, ...]:
        """What it finds in a text, in the order in which it begins."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._seen.pop(digest, None)
        if known is None:
            known = await asyncio.get_running_loop().run_in_executor(self._thread, self._analyze, text)
            if len(self._seen) >= _MAX_ENTRIES:
                del self._seen[next(iter(self._seen))]
        self._seen[digest] = known
        return known

    def _analyze(self, text: str) -> tuple[Finding, ...]:
        settings = self._settings
        results = self._analyzer.analyze(
            text=text, language=settings.language, entities=list(settings.entities), score_threshold=settings.min_score
        )
        return tuple(
            Finding(_KINDS.get(one.entity_type, one.entity_type.lower()), one.start, one.end)
            for one in sorted(results, key=lambda one: int(one.start))
        )


def kind_of(entity: str) -> str:
    """Our name of one of Presidio's entities."""
    return _KINDS.get(entity, entity.lower())


def _analyzer(settings: PresidioSettings) -> Any:
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise MissingDependencyError("presidio-analyzer", "presidio", "sensitivity.presidio") from None
    # Its check of e-mail addresses would fetch a list of domains from the internet; the one it comes with will do.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    language = settings.language
    engine: Any = SpacyNlpEngine(models=[{"lang_code": language, "model_name": settings.model or f"blank:{language}"}])
    try:
        engine.nlp = {language: spacy.blank(language) if settings.model is None else spacy.load(settings.model)}
    except (OSError, ImportError) as error:
        raise ConfigurationError(
            f"sensitivity.presidio: the spaCy language or model {settings.model or language!r} cannot be loaded "
            f"({str(error).splitlines()[0]}); install it"
        ) from None
    registry = RecognizerRegistry(supported_languages=[language])
    registry.load_predefined_recognizers(languages=[language], nlp_engine=engine)
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])
