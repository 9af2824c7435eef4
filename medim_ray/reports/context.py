"""Cues around a mention: negation, uncertainty, earlier findings, and where their scope ends (after ConText).

Source of the idea: Harkema et al., "ConText", J. Biomed. Inform. 42 (2009) 839; the cue lists are this project's own.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["CUE_TERMS", "MODIFIERS", "Cue"]


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
    LIKELY_AFTER = 10  # "compatible with": said with confidence, counts as present
    DIFFERENTIAL = 11  # "versus": both neighbours are uncertain


_CUES = {
    Cue.IGNORE: """
        no change; no significant change; no interval change; no significant interval change; without change;
        not only; no longer than; no significantly changed; not significantly changed; not changed; no;
        further; no increase; no change in; without significant change; without interval change; no prior;
        comparison; no previous; no comparisons; none available; not well; not fully; not completely; no more;
        than; no appreciable change; no substantial change; no evidence of change; not necessarily; negative;
        chest; no xxxx change; no significant xxxx change; no large change; normal variant
        """,
    Cue.END: """
        but; however; although; though; except; except for; apart from; aside from; otherwise; with the;
        exception of; other than; nevertheless; yet; whereas; while; there is; there are; there has; there;
        have; there was; there were; there continues; there remains; which is; demonstrate; demonstrates;
        shows; show; reveals; reveal; but there; and there; are noted; is noted; is also; are also; also;
        noted; again noted is; note is made of; note made of; in addition; additionally; instead; still
        """,
    Cue.ABSENT_AFTER: """
        no; not; without; without evidence of; no evidence of; no evidence for; no definite; evidence of;
        negative for; free of; clear of; absence of; absent; denies; denied; deny; devoid of; lack of; lacks;
        resolution of; interval resolution of; complete resolution of; resolved; rather than; as opposed to;
        neither; nor; none; never; ruled out for; rule out for; removal of; interval removal; of; fail to;
        fails to; no longer; no sign of; no signs of; never had; not a; no obvious; suspicious; free from;
        failure to; less likely; unlikely; unlikely to be; unlikely to represent; visible; cleared of;
        clearing of; interval clearing of; nonvisualization of; not due to; no focal; acute; no convincing
        """,
    Cue.ABSENT_BEFORE: """
        not seen; not identified; not visualized; not visible; not appreciated; not evident; not present; not;
        demonstrated; not detected; not noted; is absent; are absent; not apparent; not found; not observed;
        not definitely seen; not clearly seen; not enlarged; not increased; not definitely identified;
        suspected; not clearly identified; not suggested; not significantly increased; is ruled out; are
        ruled; out; is excluded; are excluded; has resolved; have resolved; resolved; is resolved; has been
        removed; have been removed; removed; no longer seen; no longer visualized; no longer present; no
        longer; identified; no longer visible; no longer evident; cleared; has cleared; have cleared; is
        unlikely; unlikely; are unlikely; less likely; is doubtful; no longer demonstrated; no longer
        appreciated; recognized; nonspecific
        """,
    Cue.UNCERTAIN_AFTER: """
        may; may be; may represent; may reflect; might; could; could be; could represent; could reflect;
        possible; possibly; potentially; potential; question; questionable; question of; suspicious for;
        suspicion for; suspicion of; suspected; suspect; concerning for; concern for; concern of; worrisome;
        for; rule out; r o; cannot exclude; can not exclude; cannot rule out; cannot be excluded; not exclude;
        not excluded; does not exclude; do not exclude; not entirely exclude; not rule out; differential;
        differential diagnosis; differential includes; differential considerations; considerations include;
        consider; considered; consideration; equivocal; suggestion of; evaluate for; evaluation for;
        evaluation of; assess for; to exclude; exclude; perhaps; presumably; presumed; presumptive; raises;
        raising; indeterminate; might be; might represent; either; can be seen; can be; should be; if; to;
        evaluate; correlation for; correlate for; screen for; looking for; concern; whether; suggested;
        attributable to; differential for; to rule out
        """,
    Cue.UNCERTAIN_BEFORE: """
        not excluded; not be excluded; cannot be excluded; can not be excluded; not entirely excluded; not;
        completely excluded; not be entirely excluded; cannot be entirely excluded; is possible; are possible;
        is suspected; are suspected; is considered; is questioned; would be difficult to exclude; not be
        ruled; out; cannot be ruled out; is a possibility; is a consideration; may be present; could be
        present; in; the differential; possible; is not excluded; are not excluded; suspected; not entirely be
        excluded; be; considered
        """,
    Cue.DIFFERENTIAL: """
        versus; vs; as opposed; or possibly; or alternatively; and or
        """,
    Cue.LIKELY_AFTER: """
        compatible with; consistent with; most likely; likely; probable; probably; suggestive of; suggesting;
        suggest; suggests; indicating; indicative of; favor; favors; favoring; favored; representing;
        represents; represent; reflecting; reflects; reflect; most compatible with; most consistent with;
        related to; relates to; secondary to; due to; in keeping with; evidence of; diagnostic of;
        characteristic of; thought to represent; felt to represent; appears to represent; appear to represent;
        corresponds to; corresponding to; indicate; indicates; likely due to; most suggestive of; attributed;
        to
        """,
    Cue.KNOWN: """
        unchanged; stable; again; again seen; again noted; again demonstrated; again identified; persistent;
        persists; remains; remain; chronic appearing; known; redemonstrated; redemonstration of; from; not
        significantly changed; no significant change in; no change in; as before; previously seen; previously
        noted; previously described; previously identified; previously demonstrated; continued; continues;
        residual; similar to prior; similar appearance; unchanged appearance; stable appearance; stable from
        prior; grossly unchanged; essentially unchanged; relatively unchanged; not changed; unchanged in
        appearance; preexisting; pre existing; old; similar; longstanding; long standing
        """,
    Cue.PAST_AFTER: """
        history of; hx of; h o; status post; s p; prior history of; past history of; past medical history of;
        with history of; personal history of; family history of; known history of; history; previous history;
        of
        """,
    Cue.PAST_BEFORE: """
        in the past; by history; on the prior; on the previous; on prior study; on previous study; seen
        previously; in the interval has resolved
        """,
    Cue.NORMAL: """
        normal; within normal limits; within normal; unremarkable; clear; intact; normal in; is within normal;
        limits; within limits of normal; not remarkable; nonenlarged; midline; preserved; maintained; well;
        expanded; physiologic; not unusual; wnl; normal limits; upper limits of normal; upper limits normal;
        normal for age; within normal limit; no abnormality; negative
        """,
}
# (phrase, cue); a phrase may stand under several cues.
CUE_TERMS: tuple[tuple[str, Cue], ...] = tuple(
    (" ".join(phrase.split()), cue) for cue, table in _CUES.items() for phrase in table.split(";") if phrase.strip()
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
MODIFIERS: dict[str, tuple[tuple[str, str], ...]] = {}
for _slot, _values in _MODIFIER_WORDS.items():
    for _value, _words in _values.items():
        for _word in _words.split():
            MODIFIERS[_word] = (*MODIFIERS.get(_word, ()), (_slot, _value))
