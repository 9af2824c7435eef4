"""Abnormal anatomy: how an indexer turns "low lung volumes" or "the aorta is tortuous" into the heading of the organ.

Phrases stand for themselves; a state ("tortuous") needs one of its anatomies nearby. From general radiology usage.
"""

__all__ = ["ABNORMAL_PHRASES", "STATE_RULES", "STATE_TERMS"]

# Phrase -> heading that it indexes as a finding.
ABNORMAL_PHRASES = """
Lung | azygos lobe; azygos fissure; azygous lobe; azygous fissure; under expanded; under inflated; low lung volume;
    lung volumes are low; low volume; diminished lung volume; decreased lung volume; reduced lung volume; small lung
    volume; shallow inspiration; poor inspiration; hypoinflation; hypoinflated; hypoaeration; hypoventilation;
    hypoventilatory; hypoexpanded; hypoexpansion; underinflated; underinflation; low inspiratory volume; poor
    inspiratory effort; shallow lung inflation; low inspiration; hyperexpansion; hyperexpanded; hyperinflation;
    hyperinflated; hyperaeration; hyperaerated; overinflation; overinflated; overexpanded; overexpansion;
    hyperdistention; hyperdistended; hyperventilation; air trapping; barrel chest; increased lung volume; large lung
    volume; lung volumes are increased; lung volumes are diminished; lung volumes are decreased; lung volumes are
    reduced; decreased lung inflation; increased retrosternal airspace; increased retrosternal air space; enlarged
    retrosternal airspace; low lung inflation; lungs are low; increased ap diameter; increased lung lucency; hyper
    expanded; hyper inflated; hyper expansion; hyper inflation; hypo inflated; hypo inflation; hypoinspiration;
    hypoinflative; hyperinflative; expiratory; decreased inspiratory; poor inflation; shallow inflation; crowding of
    the lung
Costophrenic Angle | blunted angle; blunting of the angle
Thoracic Vertebrae | thoracic degenerative change; thoracic degenerative disc disease; thoracic degenerative disease
"""

# State -> words for it.
STATE_TERMS = """
elevated | elevated; elevation; raised; high riding
flattened | flattened; flattening; flat
blunted | blunted; blunting; blunt
obscured | obscured; obscuration; obscuring; obscures; effacement; effaced; silhouetting; indistinct; obliteration;
    obliterated
tortuous | tortuous; tortuosity; ectatic; ectasia; unfolded; unfolding; uncoiled; uncoiling; elongated; elongation
nodal | adenopathy; lymphadenopathy; enlarged lymph node; prominent lymph node
tip | tip; distal tip
dilated | dilated; dilatation; dilation
enlarged | enlarged; enlargement; prominent; prominence; increased in size; fullness; widened; widening; mildly
    enlarged
degenerative | degenerative; degeneration; degenerated; hypertrophic; degenerative change; degenerative disease;
    degenerative disc disease; degenerative endplate change; hypertrophic change; productive change; multilevel
    degenerative; discogenic
borderline | borderline; borderline enlarged; borderline large
lowered | low; lower; decreased; diminished; reduced; small; poor; shallow; slightly low; mildly low
raised | increased; large; high
"""

# Heading indexed | anatomy headings | states. Anatomy must stand in the same clause.
STATE_RULES = """
Diaphragm | Diaphragm | elevated; flattened; obscured
Costophrenic Angle | Costophrenic Angle | blunted; obscured
Sulcus | Sulcus | blunted; obscured
Aorta | Aorta | tortuous; dilated; enlarged
Aorta, Thoracic | Aorta, Thoracic | tortuous; dilated; enlarged
Cardiomegaly | Heart | enlarged; borderline; raised
Cardiac Shadow | Cardiac Shadow | enlarged; borderline
Heart | Heart | obscured
Mediastinum | Mediastinum | enlarged; nodal
Lung | Hilum; Interstitium | enlarged; nodal
Thoracic Vertebrae | Thoracic Vertebrae; Thoracolumbar Spine | degenerative
Lumbar Vertebrae | Lumbar Vertebrae; Thoracolumbar Spine | degenerative
Cervical Vertebrae | Cervical Vertebrae | degenerative
Spine | Spine | degenerative
Shoulder | Shoulder | degenerative
Pulmonary Artery | Pulmonary Artery | enlarged; dilated
Heart Atria | Heart Atria | enlarged; dilated
Heart Ventricles | Heart Ventricles | enlarged; dilated
Lymph Nodes | Lymph Nodes | enlarged
Thyroid Gland | Thyroid Gland | enlarged
Pulmonary Congestion | Pulmonary Vessels; Blood Vessels; Pulmonary Veins | enlarged; obscured; dilated
Catheters, Indwelling | Vena Cava, Superior | tip
Lung | Lung Volume | lowered; raised
"""
