"""Cues around a mention: negation, uncertainty, earlier findings, and where their scope ends (after ConText).

Source of the idea: Harkema et al., "ConText", J. Biomed. Inform. 42 (2009) 839; the cue lists are this project's own.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "CUE_TERMS",
    "EMPHASIS_WORDS",
    "EXPLAINING_WORDS",
    "MODIFIERS",
    "MODIFIER_BOUNDARIES",
    "PLACING_WORDS",
    "Cue",
]


class Cue(IntEnum):
    """What a cue does, and to which side of it."""

    IGNORE = 0  # looks like a cue and is none ("no change")
    END = 1  # ends every scope
    ABSENT_AFTER = 2
    ABSENT_BEFORE = 3
    UNCERTAIN_AFTER = 4
    UNCERTAIN_BEFORE = 5
    KNOWN = 6  # unchanged: the mention right after it, else those before it
    PAST_AFTER = 7  # history of
    PAST_BEFORE = 8
    NORMAL = 9  # "normal": the words next to it, else those before it
    DIFFERENTIAL = 10  # "versus": both neighbours are uncertain


_CUES = {
    Cue.IGNORE: """
        no change; no significant change; no interval change; no significant interval change; without change;
        not only; no further; no increase; without significant change; no xxxx change; without interval change;
        no prior; no comparison; no previous; not well; not fully; mass effect; body mass index; body mass; w /;
        and or; and / or;
        nearly resolved; almost resolved; nearly completely resolved; almost completely resolved; has nearly resolved;
        have nearly resolved; partially resolved; mostly resolved; largely resolved; partial resolution of;
        near complete resolution of; not completely resolved; incompletely resolved;
        not completely; no more than; no appreciable change; no substantial change; no evidence of change; not
        necessarily; no significant xxxx change; no large change; normal variant; soft tissue edema;
        subcutaneous edema; leg edema; pedal edema; peripheral edema; is excluded from; are excluded from; non
        calcified; non displaced
        """,
    Cue.END: """
        but; however; although; though; except; except for; apart from; aside from; otherwise; with the
        exception of; other than; nevertheless; yet; whereas; while; there is; there are; there has; there
        have; there was; there were; there continues; there remains; which is; demonstrate; demonstrates;
        shows; show; reveals; reveal; note is made of; note made of; additionally; instead
        """,
    Cue.ABSENT_AFTER: """
        no; not; without; without evidence of; no evidence of; no evidence for; no definite; no definite
        evidence of; negative for; free of; free from; clear of; absence of; absent; denies; denied; deny;
        devoid of; lack of; lacks; resolution of; interval resolution of; complete resolution of; resolved;
        rather than; as opposed to; neither; nor; none; never; ruled out for; removal of; interval removal of;
        fail to; fails to; failure to; no longer; no sign of; no signs of; not a; no obvious; no suspicious;
        less likely; unlikely; unlikely to be; unlikely to represent; no visible; cleared of; clearing of;
        interval clearing of; nonvisualization of; not due to; no focal; no acute; no convincing; w / o; neg for; neg;
        unremarkable for; normal without; (-); nothing to suggest; nothing suggestive of; removed; kein; keine; keinen;
        keinerlei; nicht; ohne; sem; sin; sans; pas de; senza; nessun; ingen; geen; zonder; low likelihood for
        """,
    Cue.ABSENT_BEFORE: """
        not seen; not identified; not visualized; not visible; not appreciated; not evident; not present; not
        demonstrated; not detected; not noted; is absent; are absent; not apparent; not found; not observed;
        not definitely seen; not clearly seen; not definitely identified; not clearly identified; not
        suspected; not suggested; is ruled out; are ruled out; is excluded; are excluded; has resolved; have
        resolved; resolved; is resolved; has been removed; have been removed; removed; no longer seen; no
        longer visualized; no longer present; no longer identified; no longer visible; no longer evident; no
        longer demonstrated; no longer appreciated; cleared; has cleared; have cleared; unlikely; is unlikely;
        are unlikely; less likely; is doubtful; negative; is negative; are negative
        """,
    Cue.UNCERTAIN_AFTER: """
        may; may be; may represent; may reflect; might; might be; might represent; could; could be; could
        represent; could reflect; possible; possibly; potentially; potential; question; questionable; question
        of; suspicious for; suspicion for; suspicion of; suspected; suspect; concerning for; concern; concern
        for; concern of; worrisome for; rule out; to rule out; r o; r / o; ?; doubt; doubtful; low likelihood of;
        low probability of; likelihood of; cannot exclude; can not exclude; cannot
        rule out; cannot be excluded; not exclude; not excluded; does not exclude; do not exclude; not
        entirely exclude; not rule out; differential; differential diagnosis; differential includes;
        differential considerations; differential for; considerations include; consider; considered;
        consideration; equivocal; query; suggestion of; suggest; suggests; suggesting; suggestive of; most
        suggestive of; favor; favors; favoring; favored; maybe; evaluate for; to evaluate; evaluation for;
        evaluation of; assess for; exclude; to exclude; perhaps; presumably; presumed; presumptive; raises;
        raising; indeterminate; either; can be; can be seen; should be; if; correlate for; correlation for;
        screen for; looking for; whether; suggested; attributable to
        """,
    Cue.UNCERTAIN_BEFORE: """
        not excluded; is not excluded; are not excluded; not be excluded; cannot be excluded; can not be
        excluded; not entirely excluded; not completely excluded; not be entirely excluded; not entirely be
        excluded; cannot be entirely excluded; not be ruled out; cannot be ruled out; would be difficult to
        exclude; is possible; are possible; is suspected; are suspected; is considered; be considered; is
        questioned; is a possibility; is a consideration; may be present; could be present; in the
        differential; possible; could be considered; may be considered; should be considered;
        cannot be entirely ruled out; cannot be completely ruled out; not be entirely ruled out; not be completely
        ruled out; not entirely ruled out; not completely ruled out; cannot be completely excluded; not be completely
        excluded; cannot be fully excluded; cannot be definitively excluded
        """,
    Cue.DIFFERENTIAL: """
        versus; vs; or possibly; or alternatively
        """,
    Cue.KNOWN: """
        unchanged; stable; not changed; is not changed; are not changed; has not changed; have not changed; not
        significantly changed; has not significantly changed; have not significantly changed; no interval change in;
        no significant interval change in; no appreciable change in; no increase in; no interval increase in; no
        significant increase in; no enlargement of; no interval enlargement of; no worsening of; no interval worsening
        of; no progression of; no interval progression of; again; again seen; again noted; again demonstrated; again
        identified; persistent;
        persists; remains; remain; known; redemonstrated; redemonstration of; unchanged from; no significant
        change in; no change in; as before; previously seen; previously noted; previously described;
        previously identified; previously demonstrated; continued; continues; residual; similar; similar to
        prior; similar appearance; unchanged appearance; stable appearance; stable from prior; grossly
        unchanged; essentially unchanged; relatively unchanged; unchanged in appearance; preexisting; pre
        existing; old; longstanding; long standing
        """,
    Cue.PAST_AFTER: """
        history of; hx of; h o; h / o; status post; s p; s / p; prior history of; past history of; past medical history
        of;
        with history of; personal history of; family history of; known history of; previous history of;
        history
        """,
    Cue.PAST_BEFORE: """
        in the past; by history; on the prior; on the previous; on prior study; on previous study; seen
        previously
        """,
    Cue.NORMAL: """
        normal; within normal limits; within normal limit; within normal; is within normal limits; normal
        limits; within limits of normal; upper limits of normal; upper limits normal; normal in; normal for
        age; unremarkable; clear; intact; not remarkable; nonenlarged; low normal; midline; preserved;
        maintained; well expanded; physiologic; wnl; not unusual; no abnormality; negative; not increased; not
        prominent
        """,
}
# What was not there on an earlier study is there now: "not seen on the prior study".
_SEEN = "seen present identified visualized visible noted evident demonstrated appreciated"
_EARLIER = ("on the prior", "on prior", "on the previous", "on previous", "on the comparison", "previously")
_NEWLY_SEEN = tuple(f"not {verb} {earlier}" for verb in _SEEN.split() for earlier in _EARLIER)
# (phrase, cue); a phrase may stand under several cues.
CUE_TERMS: tuple[tuple[str, Cue], ...] = (
    *((" ".join(phrase.split()), cue) for cue, table in _CUES.items() for phrase in table.split(";") if phrase.strip()),
    *((phrase, Cue.IGNORE) for phrase in (*_NEWLY_SEEN, *(f"not previously {verb}" for verb in _SEEN.split()))),
)

# Single words that say where or how: slot -> value -> words.
_MODIFIER_WORDS = {
    "side": {
        "left": "left lul lll lingula lingular leftward levoscoliosis",
        "right": "right rul rml rll rightward dextroscoliosis",
        "bilateral": "bilateral bilaterally both bibasilar bibasal biapical bihilar bibasally bi biapically",
    },
    "zone": {
        "upper": "upper rul lul suprahilar superior",
        "middle": "middle mid midlung midzone rml lingula lingular",
        "lower": "lower rll lll inferior infrahilar",
        "apical": "apex apical apices biapical apically biapically",
        "basal": "base bases basilar basal bibasilar bibasal basally bibasally costophrenic subpulmonic",
        "perihilar": "hilar hilum hila perihilar parahilar bihilar",
        "retrocardiac": "retrocardiac",
        "mediastinal": "mediastinal mediastinum paratracheal paramediastinal subcarinal infracarinal",
    },
    "course": {
        "new": "new newly developing development developed",
        "worse": "worse worsening worsened increased increasing enlarging progressed progression larger",
        "improved": "improved improving improvement decreased decreasing smaller resolving clearing",
        "stable": "stable unchanged",
        "acute": "acute acutely",
        "chronic": "chronic chronically old remote healed longstanding",
    },
}
# Words that no side, zone or course reaches across; a comma lets them through where emphasis follows it ("effusions,
# most marked on the left"). Words that tie an explanation to the finding before it ("opacity, likely atelectasis").
_BOUNDARY_WORDS = ", ; : - \u2013 \u2014 but however although except without no otherwise"
MODIFIER_BOUNDARIES = frozenset(_BOUNDARY_WORDS.split())
_EMPHASIS = "most mostly more predominantly particularly especially greater worse primarily mainly greatest maximal"
EMPHASIS_WORDS = frozenset(_EMPHASIS.split())
_EXPLAINING = """
likely probably represent represents representing reflect reflects reflecting compatible consistent suggest suggests
suggesting suggestive versus vs concerning or suspicious indicate indicates indicating due secondary by
"""
EXPLAINING_WORDS = frozenset(_EXPLAINING.split())
PLACING_WORDS = frozenset(("in", "at", "within", "over", "involving", "throughout", "along", "near"))
MODIFIERS: dict[str, tuple[tuple[str, str], ...]] = {}
for _slot, _values in _MODIFIER_WORDS.items():
    for _value, _words in _values.items():
        for _word in _words.split():
            MODIFIERS[_word] = (*MODIFIERS.get(_word, ()), (_slot, _value))
