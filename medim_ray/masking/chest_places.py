"""The chest as a radiologist draws it: which part of a frontal film each heading belongs to, and the part's shape.

Numbers are fractions of a film that holds the whole chest: y down from the upper edge, x from left to right, d the
distance from the midline. From general anatomy (thirds of the lung, cardiothoracic ratio 0.5, carina at T5); edges are
soft by what habitus, breath and positioning move them. prior.py turns these into maps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medim_ray.reports.chest_terms import table_rows

__all__ = ["PLACE_OF_HEADING", "PLACE_WORDS", "draw_place"]

Array = NDArray[np.float64]
_SOFT = 0.03  # width of an edge

# Kind of place | headings of medim_ray.reports.chest_terms that belong there.
_HEADINGS = """
lung | Abscess; Airspace Disease; Asthma; Blister; Bronchiectasis; Bronchiolitis; Bronchitis; Bullous Emphysema;
    Calcified Granuloma; Calcinosis; Cavitation; Cicatrix; Consolidation; Cysts; Cystic Fibrosis; Density; Emphysema;
    Granuloma; Granulomatous Disease; Histoplasmosis; Infarction; Infiltrate; Lucency; Lung Diseases, Interstitial;
    Lung, Hyperlucent; Markings; Mass; Neoplasm Metastasis; Neoplasms; Nodule; Opacity; Pneumonia; Pulmonary
    Atelectasis; Pulmonary Disease, Chronic Obstructive; Pulmonary Embolism; Pulmonary Emphysema; Pulmonary Fibrosis;
    Silicosis; Tuberculosis; Volume Loss; Lung Transplantation; Pneumonectomy; Thoracotomy; Lung; Lung Volume;
    Interstitium; Bronchi; Thorax
perihilar | Pulmonary Edema; Pulmonary Congestion
effusion | Pleural Effusion; Hemothorax; Costophrenic Angle; Sulcus
pneumothorax | Pneumothorax; Hemopneumothorax; Hydropneumothorax
pleura | Thickening; Pleural Plaque; Pleura
heart | Cardiomegaly; Heart Failure; Pericardial Effusion; Pneumopericardium; Cardiac Shadow; Heart; Heart Atria;
    Heart Ventricles; Pericardium; Coronary Vessels; Aortic Valve; Mitral Valve; Situs Inversus
heart_fat | Epicardial Fat; Cardiophrenic Angle
mediastinum | Pneumomediastinum; Lymphadenopathy; Shift; Mediastinum; Lymph Nodes; Esophagus
aorta | Aneurysm; Aortic Aneurysm; Atherosclerosis; Aorta; Aorta, Thoracic
hilum | Hypertension, Pulmonary; Sarcoidosis; Hilum; Pulmonary Artery; Pulmonary Veins; Pulmonary Vessels; Blood Vessels
trachea | Trachea; Trachea, Carina; Neck; Thyroid Gland
spine | Hyperostosis, Diffuse Idiopathic Skeletal; Kyphosis; Lordosis; Osteophyte; Osteoporosis; Scoliosis; Spondylosis;
    Spinal Fusion; Bone Diseases, Metabolic; Spine; Thoracic Vertebrae; Thoracolumbar Spine; Cervical Vertebrae
sternum | Sternotomy; Coronary Artery Bypass; Sutures; Sternum; Funnel Chest; Pectus Carinatum
ribs | Fractures, Bone; Deformity; Sclerosis; Expansile Bone Lesions; Ribs; Bone and Bones; Thoracic Wall
clavicle | Clavicle
shoulder | Arthritis; Dislocations; Shoulder; Humerus; Scapula
flank | Subcutaneous Emphysema; Axilla; Soft Tissue; Adipose Tissue
breast | Breast Implants; Mastectomy; Nipple Shadow; Breast
diaphragm | Diaphragmatic Eventration; Hernia, Diaphragmatic; Diaphragm
hiatus | Hernia, Hiatal
free_air | Pneumoperitoneum
abdomen | Abdomen; Colon; Colonic Interposition; Lumbar Vertebrae
liver | Cholelithiasis; Cholecystectomy; Gallbladder; Liver
stomach | Stomach
pacemaker | Implanted Medical Device
central_line | Catheters, Indwelling; Vena Cava, Superior; Subclavian Vein; Jugular Veins
airway_tube | Tube, Inserted
"""
PLACE_OF_HEADING: dict[str, str] = {
    heading: kind for kind, headings in table_rows(_HEADINGS) for heading in headings if heading
}
# Headings that cover several places: what the words say (a part of them, first match wins).
PLACE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "Tube, Inserted": (
        *((word, "pleural_tube") for word in ("chest", "thoracostomy", "pleural", "pigtail", "drain")),
        *(
            (word, "gastric_tube")
            for word in ("gastric", "ng", "og", "enteric", "feeding", "dob", "peg", "gastrostomy")
        ),
    ),
    "Implanted Medical Device": (
        *((word, "heart") for word in ("valve", "occluder", "annulo")),
        *((word, "shoulder") for word in ("arthroplasty", "shoulder", "anchor")),
        *((word, "spine") for word in ("spinal", "rod", "screw")),
        ("ivc", "abdomen"),
    ),
    "Thickening": (("paratracheal", "trachea"), ("interstitial", "lung"), ("peribronchial", "perihilar")),
    "Fractures, Bone": (("compression", "spine"),),
    "Deformity": tuple((word, "spine") for word in ("wedg", "compress", "height")),
}


def _above(value: Array, edge: Array | float, soft: float = _SOFT) -> Array:
    """A soft step: 0 far below the edge, 1 far above it."""
    step: Array = 1 / (1 + np.exp(-np.clip((value - edge) / (0.5 * soft), -40, 40)))
    return step


def _between(value: Array, low: Array | float, high: Array | float, soft: float = _SOFT) -> Array:
    return _above(value, low, soft) * (1 - _above(value, high, soft))


def _blob(y: Array, d: Array, centre_y: float, centre_d: float, sigma_y: float, sigma_d: float) -> Array:
    blob: Array = np.exp(-0.5 * (((y - centre_y) / sigma_y) ** 2 + ((d - centre_d) / sigma_d) ** 2))
    return blob


def _lung(y: Array, d: Array, is_left: bool, drop: float = 0.0) -> Array:
    """One lung; `drop` lowers its floor. The heart takes a part of the left one, lung behind it is seen through it."""
    lateral = np.interp(y, (0.06, 0.12, 0.22, 0.40, 0.60, 0.90), (0.17, 0.25, 0.32, 0.37, 0.395, 0.41))
    heart = (0.055, 0.06, 0.10, 0.15, 0.17) if is_left else (0.055, 0.06, 0.07, 0.09, 0.09)
    medial = np.interp(y, (0.10, 0.30, 0.45, 0.60, 0.75), heart)
    floor = np.interp(d, (0.05, 0.20, 0.30, 0.40), (0.74, 0.72, 0.75, 0.83)) + (0.02 if is_left else 0.0) + drop
    top = np.interp(d, (0.05, 0.14, 0.25, 0.33), (0.11, 0.09, 0.13, 0.22))
    behind_heart = 0.35 if is_left else 0.2
    seen = behind_heart + (1 - behind_heart) * _above(d, medial)
    return seen * _between(d, 0.045, lateral) * _between(y, top, floor, 1.3 * _SOFT)


# Zones of a lung: soft bands, by the second and fourth anterior ribs; apex and base are the ends of the outer zones.
_BANDS = {
    "upper": (0.00, 0.34), "apical": (0.00, 0.26), "middle": (0.32, 0.55), "lower": (0.53, 1.00), "basal": (0.60, 1.00),
}  # fmt: skip


def _in_zone(y: Array, d: Array, zone: str) -> Array:
    """Weight of each point for a zone; 1 where none is told."""
    if zone in _BANDS:
        return _between(y + 0 * d, *_BANDS[zone], 2 * _SOFT)
    if zone == "perihilar":
        return _blob(y, d, 0.45, 0.14, 0.13, 0.10)
    if zone == "retrocardiac":
        return _blob(y, d, 0.65, 0.09, 0.09, 0.07)
    if zone == "mediastinal":
        return _between(d, -1.0, 0.10) + 0 * y
    return np.ones(np.broadcast_shapes(y.shape, d.shape))


def _lung_zone(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    return _lung(y, d, is_left) * _in_zone(y, d, zone) + 1e-6 * _in_zone(y, d, zone)


def _perihilar(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    """Fluid spreads from the hila like wings, unless the report says where."""
    if zone in ("", "perihilar", "middle"):
        return _lung(y, d, is_left) * _blob(y, d, 0.47, 0.16, 0.15, 0.11)
    return _lung_zone(y, d, is_left, zone)


def _effusion(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    """Fluid gathers in the costophrenic angle and rises along the lateral wall, whatever zone is named."""
    depth = np.exp(-np.clip(0.86 - y, 0, None) / 0.13)
    return _lung(y, d, is_left, drop=0.05) * depth * (0.25 + np.clip(d / 0.4, 0, 1))


def _pneumothorax(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    """Air rises to the apex and lines the lateral wall; below it gathers at the lateral base."""
    lung = _lung(y, d, is_left)
    lateral = np.interp(y, (0.06, 0.12, 0.22, 0.40, 0.60, 0.90), (0.17, 0.25, 0.32, 0.37, 0.395, 0.41))
    rim = np.exp(-np.clip(lateral - d, 0, None) / 0.06)
    if zone in ("middle", "lower", "basal"):
        return lung * rim * _in_zone(y, d, zone)
    return lung * (np.exp(-np.clip(y - 0.10, 0, None) / 0.09) + 0.35 * rim * np.exp(-y / 0.35))


def _pleura(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    lateral = np.interp(y, (0.06, 0.12, 0.22, 0.40, 0.60, 0.90), (0.17, 0.25, 0.32, 0.37, 0.395, 0.41))
    return _lung_zone(y, d, is_left, zone) * np.exp(-np.abs(lateral - d) / 0.06)


def _pleural_tube(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    """From the lateral wall about the fifth intercostal space towards apex or base."""
    wall = _between(d, 0.24, 0.46) * _between(y, 0.40, 0.72, 0.08)
    within = _lung(y, d, is_left) * _above(d, 0.12)
    return 0.6 * wall + within * (_in_zone(y, d, zone) if zone else 1.0)


def _central_line(y: Array, d: Array, is_left: bool, zone: str) -> Array:
    """From below the clavicle, or the neck, to the superior vena cava; on the left across the midline."""
    course = _between(d, 0.02, 0.34) * np.exp(-0.5 * ((y - (0.24 - 0.35 * (d - 0.1))) / 0.06) ** 2)
    cava = 0.0 if is_left else 1.0
    return course + cava * _blob(y, d, 0.36, 0.06, 0.08, 0.03)


_Shape = Callable[[Array, Array, bool, str], Array]
# Places that each side has: (y, distance from the midline, is left, zone) -> weight.
_SIDED: dict[str, _Shape] = {
    "lung": _lung_zone,
    "perihilar": _perihilar,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "pleura": _pleura,
    "pleural_tube": _pleural_tube,
    "central_line": _central_line,
    "hilum": lambda y, d, left, zone: _blob(y, d, 0.42 if left else 0.44, 0.11, 0.06, 0.05),
    "ribs": lambda y, d, left, zone: _between(d, 0.08, 0.44) * _between(y, 0.08, 0.88) * _in_zone(y, d, zone) + 1e-9,
    "clavicle": lambda y, d, left, zone: _between(d, 0.04, 0.36) * _blob(y, 0 * d, 0.13, 0.0, 0.04, 1.0),
    "shoulder": lambda y, d, left, zone: _blob(y, d, 0.13, 0.43, 0.08, 0.06),
    "flank": lambda y, d, left, zone: _above(d, 0.38) * _between(y, 0.12, 0.85),
    "breast": lambda y, d, left, zone: _blob(y, d, 0.68, 0.25, 0.10, 0.10),
    "diaphragm": lambda y, d, left, zone: (
        _between(d, 0.03, 0.41)
        * np.exp(-0.5 * ((y - np.interp(d, (0.05, 0.20, 0.30, 0.40), (0.75, 0.72, 0.75, 0.83))) / 0.05) ** 2)
    ),
    "free_air": lambda y, d, left, zone: _between(d, 0.05, 0.35) * _blob(y, 0 * d, 0.78, 0.0, 0.05, 1.0),
    "pacemaker": lambda y, d, left, zone: _blob(y, d, 0.22, 0.30, 0.07, 0.07),
}
# Places that have no side: (y, x) -> weight.
_MIDDLE: dict[str, Callable[[Array, Array], Array]] = {
    "heart": lambda y, x: _above(1 - np.hypot((x - 0.555) / 0.21, (y - 0.62) / 0.16), 0.0, 0.25),
    "heart_fat": lambda y, x: _blob(y, x, 0.70, 0.72, 0.05, 0.06) + _blob(y, x, 0.70, 0.37, 0.05, 0.05),
    "mediastinum": lambda y, x: _between(x, 0.40, 0.61) * _between(y, 0.12, 0.55),
    "aorta": lambda y, x: _blob(y, x, 0.30, 0.57, 0.06, 0.05) + 0.3 * _between(x, 0.52, 0.60) * _between(y, 0.30, 0.75),
    "trachea": lambda y, x: _between(x, 0.46, 0.53) * _between(y, 0.02, 0.40),
    "spine": lambda y, x: _between(x, 0.44, 0.56) * _above(y, 0.03),
    "sternum": lambda y, x: _between(x, 0.43, 0.57) * _between(y, 0.20, 0.75),
    "hiatus": lambda y, x: _blob(y, x, 0.70, 0.53, 0.06, 0.07),
    "abdomen": lambda y, x: _above(y, 0.82) * _between(x, 0.10, 0.90),
    "liver": lambda y, x: _above(y, 0.78) * _between(x, 0.10, 0.50),
    "stomach": lambda y, x: _above(y, 0.78) * _between(x, 0.52, 0.82),
    "airway_tube": lambda y, x: _between(x, 0.465, 0.535) * _between(y, 0.0, 0.34),
    "gastric_tube": lambda y, x: _between(x, 0.46, 0.56) * _above(y, 0.03) + _blob(y, x, 0.88, 0.64, 0.06, 0.08),
}
# How often something without a told side is on the (left, right) one, where it is not the same.
_USUAL_SIDE = {"pacemaker": (0.8, 0.2), "central_line": (0.25, 0.75)}


def draw_place(kind: str, side: str, zone: str, y: Array, x: Array) -> Array:
    """Weight >= 0 of each point (y, x) of the film for a place; its sum over the film is above 0.

    side 'left' is the patient's, on the right of the image; '' and 'bilateral' are both sides.
    """
    if kind in _MIDDLE:
        return _MIDDLE[kind](y, x)
    shape = _SIDED[kind]
    weights = {"left": (1.0, 0.0), "right": (0.0, 1.0), "": _USUAL_SIDE.get(kind, (0.5, 0.5))}.get(side, (0.5, 0.5))
    if zone == "retrocardiac" and not side:
        weights = (0.8, 0.2)
    total = np.zeros(np.broadcast_shapes(y.shape, x.shape))
    for is_left, weight in zip((True, False), weights, strict=True):
        if weight:
            distance = x - 0.5 if is_left else 0.5 - x
            total = total + weight * np.where(distance >= 0, shape(y, np.abs(distance), is_left, zone), 0.0)
    return total
