"""The bundled vocabulary: headings that index chest radiographs, with synonyms, written from general medical knowledge.

MeSH headings where MeSH has one; where radiology needs another (Opacity, Density, Markings), its usual RadLex word.
One line a heading, `Heading | term; term`; plurals are understood, and a heading without a comma is a term itself.
"""

from collections.abc import Iterator

__all__ = ["CHEST_TERMS", "table_rows"]


def table_rows(table: str) -> Iterator[tuple[str, list[str]]]:
    """(name, entries) of each row `name | entry; entry` of a rule table; an indented line continues its row."""
    for row in table.replace("\n    ", " ").strip().splitlines():
        if not row:
            continue
        name, _, entries = row.partition("|")
        yield name.strip(), [entry.strip() for entry in entries.split(";")]


CHEST_TERMS = """
[finding]
Abscess | abscess; lung abscess
Airspace Disease | airspace disease; air space disease; airspace process; air space process; alveolar disease;
    alveolar process
Aneurysm | aneurysm; aneurysmal
Aortic Aneurysm | aortic aneurysm; aneurysmal aorta; aneurysm of the aorta; aneurysmal dilatation of the aorta;
    aneurysmal dilation of the aorta; thoracic aortic aneurysm
Arthritis | arthritis; arthritic change; arthritic; arthrosis; osteoarthritis; osteoarthritic; degenerative joint
    disease; degenerative arthritis; djd; arthropathy; osteoarthrosis
Asthma | asthma
Atherosclerosis | atherosclerosis; atherosclerotic; arteriosclerosis; arteriosclerotic; atheromatous; atheroma;
    atherosclerotic calcification; atherosclerotic vascular calcification; atheromatous calcification
Blister | bulla; bleb; bullous disease; bullous change
Bone Diseases, Metabolic | osteopenia; osteopenic; demineralization; demineralized; demineralisation; bone
    demineralization; decreased bone mineralization; decreased bone mineral density; decreased bone density; diffusely
    decreased mineralization; bone density is decreased; bone mineralization is decreased
Bronchiectasis | bronchiectasis; bronchiectatic; bronchial dilatation; dilated bronchi
Bronchiolitis | bronchiolitis
Bronchitis | bronchitis; bronchitic; peribronchial cuffing; bronchial wall thickening; bronchial cuffing
Bullous Emphysema | bullous emphysema; bullous emphysematous; bullous emphysematous change
Calcified Granuloma | calcified granuloma; calcified granulomata; calcified lung granuloma; calcified pulmonary
    granuloma; granulomatous calcification; calcified granulomatous nodule
Calcinosis | calcification; calcified; calcific; calcinosis
Cardiomegaly | cardiomegaly; enlarged heart; cardiac enlargement; heart enlargement; enlargement of the heart;
    enlarged heart size; cardiac hypertrophy; heart is large; large heart; heart size is large; heart appears large;
    biventricular enlargement; large cardiac silhouette; increased heart size; increased cardiothoracic ratio;
    enlarged cardiothoracic ratio
Cavitation | cavitation; cavitary; cavity; cavitating
Cholelithiasis | cholelithiasis; gallstone
Cicatrix | scar; scarring; cicatrix; fibrotic scar; fibrotic scarring; parenchymal scar; scarlike
Consolidation | consolidation; consolidative; consolidated
Cysts | cyst; cystic change; cystic lesion; cystic lucency
Cystic Fibrosis | cystic fibrosis
Deformity | deformity; deformed; wedging; wedge deformity; contour deformity; compression deformity; wedge
    compression; vertebral body compression; loss of vertebral body height; vertebral body height loss; loss of
    height; height loss; compressed vertebral body; irregularity; contour irregularity; contour abnormality
Density | density; hyperdensity; nodular density; hyperdense; nodular like density
Diaphragmatic Eventration | eventration; eventrated
Dislocations | dislocation; dislocated; subluxation; subluxed; listhesis; anterolisthesis; retrolisthesis;
    spondylolisthesis
Emphysema | emphysema; emphysematous; emphysematous change
Epicardial Fat | epicardial fat; epicardial fat pad; pericardial fat; pericardial fat pad; cardiophrenic fat;
    cardiophrenic fat pad; fat pad; epicardial
Expansile Bone Lesions | expansile bone lesion; expansile lesion; expansile rib lesion
Foreign Bodies | foreign body; foreign bodies; bullet; shrapnel; bullet fragment; metallic fragment; metallic foreign
    body; bb; pellet; ballistic fragment; gunshot; radiopaque foreign body; metallic density; metallic object;
    metallic body
Fractures, Bone | fracture; fractured; compression fracture; rib fracture; fracture fragment
Funnel Chest | funnel chest; pectus excavatum; pectus deformity
Granuloma | granuloma; granulomata; granulomatous nodule
Granulomatous Disease | granulomatous disease; granulomatous infection; granulomatous change; granulomatous exposure;
    granulomatous sequela; granulomatous inflammation; calcified granulomatous disease; calcified granulomatous change
Heart Failure | heart failure; congestive heart failure; chf; cardiac failure; cardiac decompensation; congestive
    failure; decompensated heart; left ventricular failure
Hemopneumothorax | hemopneumothorax
Hemothorax | hemothorax
Hernia, Diaphragmatic | diaphragmatic hernia; bochdalek hernia; morgagni hernia; hernia of the diaphragm
Hernia, Hiatal | hiatal hernia; hiatus hernia; paraesophageal hernia; hiatal
Histoplasmosis | histoplasmosis
Hydropneumothorax | hydropneumothorax
Hyperostosis, Diffuse Idiopathic Skeletal | diffuse idiopathic skeletal hyperostosis; dish; hyperostosis
Hypertension, Pulmonary | pulmonary hypertension; pulmonary arterial hypertension; pulmonary artery hypertension;
    pulmonary venous hypertension
Infarction | infarction; infarct
Infiltrate | infiltrate; infiltration; infiltrative
Kyphosis | kyphosis; kyphotic; kyphoscoliosis; dorsal kyphosis; hyperkyphosis; accentuated kyphosis; gibbus
Lordosis | lordosis; hyperlordosis
Lucency | lucency; lucent; radiolucency; radiolucent
Lung Diseases, Interstitial | interstitial lung disease; interstitial disease; interstitial pneumonitis; interstitial
    pneumonia; interstitial process; ild; interstitial lung process; chronic interstitial change; interstitial change
Lung, Hyperlucent | hyperlucent; hyperlucency; hyperlucent lung
Lymphadenopathy | lymphadenopathy; adenopathy; enlarged lymph node; lymph node enlargement; lymphadenopathic
Markings | marking; bronchovascular crowding; crowding of bronchovascular markings; bronchovascular marking;
    interstitial marking; lung marking; vascular crowding; crowding of the bronchovascular; bronchovascular; pulmonary
    marking; vascular marking; crowding
Mass | mass; mass lesion; masslike
Neoplasm Metastasis | metastasis; metastatic disease; metastatic
Neoplasms | neoplasm; malignancy; tumor; tumour; carcinoma; cancer; malignant; neoplastic; lymphoma
Nipple Shadow | nipple shadow
Nodule | nodule; nodular; nodularity; micronodule
Opacity | opacity; opacification; opacified; opacifying; nodular opacity; nodular opacification; nodular like opacity;
    nodular airspace opacity; mass like opacity; ground glass; ground glass opacity; ground glass opacification; haze;
    haziness; shadowing
Osteophyte | osteophyte; osteophytosis; osteophytic; spurring; spur; bridging osteophyte; marginal osteophyte;
    osteophyte formation; syndesmophyte
Osteoporosis | osteoporosis; osteoporotic
Pectus Carinatum | pectus carinatum
Pericardial Effusion | pericardial effusion; pericardial fluid
Pleural Effusion | pleural effusion; effusion; pleural fluid; pleural fluid collection; hydrothorax; costophrenic
    fluid; fluid in the pleural space; fissural fluid; fluid in the fissure; subpulmonic effusion; parapneumonic
    effusion
Pleural Plaque | pleural plaque; plaque
Pneumomediastinum | pneumomediastinum; mediastinal emphysema
Pneumonia | pneumonia; pna; pneumonic; bronchopneumonia; pneumonitis
Pneumopericardium | pneumopericardium
Pneumoperitoneum | pneumoperitoneum; free air; free intraperitoneal air; free peritoneal air; intraperitoneal air;
    free subdiaphragmatic air; free air under the diaphragm; free abdominal air; subdiaphragmatic air;
    subdiaphragmatic free air
Pneumothorax | pneumothorax; pneumothoraces; pneumothoraxes; ptx
Pulmonary Atelectasis | atelectasis; atelectatic; atelectases; collapse; collapsed; atelectatic change; pulmonary
    atelectasis; lobar collapse; lung collapse; lobar atelectasis; subsegmental atelectasis; discoid atelectasis;
    platelike atelectasis; plate like atelectasis; bandlike atelectasis; linear atelectasis
Pulmonary Congestion | vascular congestion; pulmonary congestion; pulmonary vascular congestion; congestion; venous
    congestion; pulmonary venous congestion; vascular engorgement; cephalization; cephalisation; pulmonary vascular
    engorgement; central vascular congestion; vascular redistribution; congested; vascular cephalization; pulmonary
    vascular redistribution; indistinct vascular margination; vascular prominence; prominence of the pulmonary
    vasculature; prominent pulmonary vasculature; indistinct pulmonary vasculature; vascular fullness
Pulmonary Disease, Chronic Obstructive | copd; chronic obstructive pulmonary disease; chronic obstructive lung
    disease; obstructive lung disease; obstructive pulmonary disease; obstructive airway disease; obstructive airways
    disease; obstructive disease; chronic airways disease; chronic obstructive disease
Pulmonary Edema | pulmonary edema; edema; interstitial edema; pulmonary oedema; oedema; alveolar edema; cardiogenic
    edema; interstitial pulmonary edema; kerley b line; kerley line; septal thickening
Pulmonary Embolism | pulmonary embolism; pulmonary embolus; pulmonary emboli
Pulmonary Emphysema | pulmonary emphysema; centrilobular emphysema; panlobular emphysema; pulmonary emphysematous
    change
Pulmonary Fibrosis | pulmonary fibrosis; lung fibrosis; interstitial fibrosis; idiopathic pulmonary fibrosis; fibrotic
    lung disease; pulmonary fibrotic change; honeycombing; fibrosis of the lung; interstitial fibrotic change;
    fibrotic interstitial lung disease; fibrosis in the lung; fibrosis in the bases; pulmonary parenchymal fibrosis;
    fibrosis; fibrotic; fibrotic change; apical fibrosis; inflammatory and fibrotic change
Sarcoidosis | sarcoidosis; sarcoid
Sclerosis | sclerosis; sclerotic
Scoliosis | scoliosis; scoliotic; dextroscoliosis; levoscoliosis; dextrocurvature; levocurvature; rotoscoliosis;
    scoliotic curvature; s shaped curvature; dextroconvex; levoconvex; thoracic curvature; convex curvature; curvature
    of the thoracic spine; curvature of the spine; spinal curvature; curvature; curvature of the thoracolumbar spine
Shift | mediastinal shift; shift of the mediastinum; tracheal deviation; deviation of the trachea; tracheal shift;
    cardiomediastinal shift; deviated trachea; midline shift; shifted; shift; trachea is deviated; deviated
Silicosis | silicosis; pneumoconiosis; asbestosis
Situs Inversus | situs inversus; dextrocardia
Spondylosis | spondylosis; spondylitic; spondylotic; spondylosis deformans; spondylitic change; spondylotic change;
    ankylosing spondylitis; spondylitis; spondyloarthropathy
Subcutaneous Emphysema | subcutaneous emphysema; subcutaneous gas; subcutaneous air; soft tissue gas; soft tissue air;
    soft tissue emphysema; chest wall emphysema
Thickening | thickening; thickened; pleural thickening; pleural reaction; apical capping; apical cap; pleural capping;
    pleural cap; thickened pleura; wall thickening; fissural thickening; paratracheal thickening; interstitial
    thickening; peribronchial thickening
Tuberculosis | tuberculosis; tb
Volume Loss | volume loss; loss of volume; lung volume loss; loss of lung volume; volume reduction

[device]
Breast Implants | breast implant; breast prosthesis; implant; breast prostheses; mammary implant; bilateral breast
    implant
Catheters, Indwelling | catheter; picc; picc line; central line; central venous catheter; central venous line; venous
    catheter; port; portacath; port a cath; mediport; powerport; venous port; chest port; dialysis catheter; central
    catheter; jugular catheter; ij catheter; subclavian catheter; ij line; subclavian line; swan ganz; swan ganz
    catheter; venous line; infusion catheter; vascular catheter; cvl; cvc; cvp line; hickman; permcath; port catheter;
    peripherally inserted central catheter; infusion port; injection port; a port; porta cath; ij central venous
    catheter; pic line
Contrast Media | contrast material in; oral contrast; residual contrast; enteric contrast; barium; contrast in the;
    contrast is seen
Implanted Medical Device | pacemaker; cardiac pacemaker; pacer; pacing wire; pacing lead; pacing device;
    defibrillator; icd; aicd; generator; prosthesis; prostheses; prosthetic; arthroplasty; valve replacement;
    prosthetic valve; aortic valve replacement; mitral valve replacement; hardware; orthopedic hardware; surgical
    hardware; intramedullary rod; side plate; valve prosthesis; septal occluder; occluder; loop recorder; stimulator;
    spinal stimulator; nerve stimulator; device; metallic hardware; surgical plate; fixation plate; ivc filter;
    annuloplasty; mechanical valve; artificial valve; shoulder replacement; rod; pacemaker icd; icd pacemaker;
    pacemaker lead; defibrillator lead; bone anchor; anchor; vagal nerve stimulator; vagus nerve stimulator; screw;
    dual lead pacemaker; pacemaker generator; pacemaker electrode; pacing electrode; cardiac device; cardiac monitor
Medical Device | medical device; external device; electronic device; monitoring device; stimulator device; monitor
    lead; cardiac monitor lead; external cardiac monitor lead; telemetry lead; ekg lead; ecg lead; overlying lead
Spinal Fusion | spinal fusion; cervical fusion; spine fusion; vertebral fusion; fusion hardware; fusion plate;
    anterior fusion; fusion of the cervical spine; fusion of the lumbar spine; acdf; lumbar fusion; thoracic fusion;
    harrington rod; spinal rod; spinal hardware; cervical spine hardware; fusion; cervical plate; pedicle screw;
    spinal fixation; anterior cervical fusion; posterior fusion; cervical spine fusion; lumbar spine fusion
Stents | stent; coronary stent; vascular stent; biliary stent; stent graft; endograft; coronary artery stent
Surgical Instruments | surgical clip; clip; vascular clip; cholecystectomy clip; metallic clip; mediastinal clip;
    surgical staple; staple; sternotomy clip; bypass clip; cabg clip; staple line; surgical material; surgical wire;
    biopsy clip; axillary clip; hemoclip
Sutures | suture; suture material; chain suture; suture line; surgical suture; surgical chain suture; sternal suture;
    sternotomy suture
Tube, Inserted | tube; endotracheal tube; et tube; ett; nasogastric tube; ng tube; chest tube; enteric tube; feeding
    tube; tracheostomy tube; tracheostomy; thoracostomy tube; orogastric tube; dobbhoff tube; pigtail catheter;
    pleural drain; enteric catheter; gastric tube; og tube; pleural catheter; tracheostomy cannula; drainage tube;
    dobhoff; nasogastric; endotracheal; ngt; ogt; drain; gastrostomy tube; peg tube; pleural drainage tube; pleural
    tube; intubated

[procedure]
Cholecystectomy | cholecystectomy
Colonic Interposition | colonic interposition; chilaiditi; interposition of colon; interposed colon; interposition of
    the colon
Coronary Artery Bypass | coronary artery bypass; cabg; bypass graft; coronary bypass; coronary artery bypass graft;
    bypass surgery
Lung Transplantation | lung transplant; lung transplantation
Mastectomy | mastectomy
Pneumonectomy | pneumonectomy; lobectomy; wedge resection; lung resection; segmentectomy; partial lobectomy; upper
    lobectomy; lower lobectomy
Sternotomy | sternotomy; median sternotomy; sternotomy wire; sternal wire; sternotomy change
Thoracotomy | thoracotomy

[quality]
Technical Quality of Image Unsatisfactory | technical quality of image unsatisfactory; limited by; suboptimal
    inspiration; motion artifact; artifact; limited study; limited exam; limited examination; suboptimal study;
    underpenetrated; under penetrated; rotated; patient rotation; suboptimal; rotation of the patient; technically
    limited; portions of the lung excluded; excluded from the field of view; limited by body habitus; limited by
    patient; suboptimal evaluation; not included on the; incompletely imaged; overpenetrated; exposure; degraded;
    motion degraded; blurred; poor inspiration; limited quality; exam is limited; examination is limited; study is
    limited; limited chest; limited radiograph; somewhat limited; slightly limited; limited secondary; limited due;
    limited because; technical limitation; suboptimal quality; technical factor; body habitus; not adequately imaged;
    not adequately evaluated; not adequately visualized; obscures detail; detail obscured; not included in the field
    of view; limited mediastinal evaluation; scatter artifact; motion; difference in technique; grid artifact; low
    quality; poor quality; nondiagnostic; repeat examination is recommended

[anatomy]
Abdomen | abdomen; abdominal; upper abdomen
Adipose Tissue | adipose tissue; fat; fatty
Aorta | aorta; aortic
Aorta, Thoracic | thoracic aorta; aortic arch; aortic knob; transverse aorta; descending aorta; ascending aorta;
    aortic knuckle; arch of the aorta; descending thoracic aorta; ascending thoracic aorta; thoracic aortic
Aortic Valve | aortic valve
Axilla | axilla; axillary
Blood Vessels | blood vessel; vascular; vessel; vasculature; vascularity
Bone and Bones | bone; bony; osseous; osseous structure; bony structure; skeletal; skeletal structure; skeleton;
    visualized bones; osseous thorax
Breast | breast; mammary
Bronchi | bronchus; bronchi; bronchial; airways; peribronchial
Cardiac Shadow | cardiac silhouette; heart silhouette; cardiac shadow; heart shadow; cardiomediastinal silhouette;
    cardiopericardial silhouette; cardio mediastinal silhouette; cardiac contour; cardiomediastinal contour; heart
    contour; cardiac outline; cardiomediastinal shadow
Cardiophrenic Angle | cardiophrenic angle; cardiophrenic
Cervical Vertebrae | cervical spine; cervical vertebra; c spine; cervical vertebral body; cervical vertebrae
Clavicle | clavicle; clavicular
Colon | colon; colonic; bowel; bowel gas
Coronary Vessels | coronary artery; coronary vessel; coronary; coronary arterial
Costophrenic Angle | costophrenic angle; costophrenic; costophrenic recess; cp angle; lateral angle; costophrenic
    sulcus
Diaphragm | diaphragm; hemidiaphragm; diaphragmatic; hemidiaphragmatic; hemi diaphragm; diaphragmatic contour;
    diaphragmatic dome; diaphragm dome
Esophagus | esophagus; esophageal
Gallbladder | gallbladder
Heart | heart; cardiac; heart size; cardiac size; heart border; cardiac border; myocardium
Heart Atria | atrium; atria; atrial; left atrial; right atrial
Heart Ventricles | ventricle; ventricular
Humerus | humerus; humeral; humeral head; humeri
Hilum | hilum; hila; hilar; perihilar; infrahilar; suprahilar; hilar region
Interstitium | interstitium; interstitial; reticular; reticulonodular; reticulation
Jugular Veins | jugular; jugular vein
Liver | liver; hepatic
Lumbar Vertebrae | lumbar spine; lumbar vertebra; l spine; lumbar vertebrae; lumbar vertebral body; lumbar
Lung | lung; pulmonary; lung field; lung zone; lung parenchyma; pulmonary parenchyma; pulmonary parenchymal; lobe;
    lobar; lung base; lung apex; base; bibasilar; basilar; bibasal; basal; apex; apical; biapical; lingula; lingular;
    upper lobe; lower lobe; middle lobe; midlung; retrocardiac; hemithorax; bases; lung zones; airspace; air space;
    alveolar; parenchyma; parenchymal; rul; rml; rll; lul; lll
Lung Volume | lung volume; inspiratory volume; lung expansion; lung inflation; inspiratory effort; degree of
    inspiration
Lymph Nodes | lymph node; node; nodal; lymph
Mediastinum | mediastinum; mediastinal; mediastinal contour; mediastinal silhouette; superior mediastinum;
    paratracheal; paratracheal stripe; paratracheal region; cardiomediastinum; mediastinal structure; paramediastinal
Mitral Valve | mitral valve; mitral annulus; mitral annular; mitral
Neck | neck
Pericardium | pericardium; pericardial
Pleura | pleura; pleural; pleural space; pleural surface; fissure; pleuroparenchymal; minor fissure; major fissure
Pulmonary Artery | pulmonary artery; pulmonary arterial; main pulmonary artery; pulmonary arteries; pulmonary trunk
Pulmonary Veins | pulmonary vein; pulmonary venous
Pulmonary Vessels | pulmonary vasculature; pulmonary vascularity; pulmonary vessel; pulmonary vascular; perihilar
    vasculature; central vasculature
Ribs | rib; costal
Scapula | scapula; scapular
Shoulder | shoulder; glenohumeral joint; acromioclavicular joint; ac joint; glenohumeral; acromioclavicular; rotator
    cuff; glenoid; shoulder joint
Spine | spine; spinal; vertebral column; vertebral; vertebra; vertebral body; disc space; disc; endplate; end plate;
    intervertebral disc; disk; disk space; intervertebral disk
Sternum | sternum; sternal; manubrium
Stomach | stomach; gastric; gastric bubble
Subclavian Vein | subclavian vein; subclavian
Sulcus | sulcus; sulci; posterior sulcus
Thoracic Vertebrae | thoracic spine; thoracic vertebra; t spine; thoracic vertebrae; thoracic vertebral body; dorsal
    spine; mid thoracic spine; lower thoracic spine; thoracic spinal; midthoracic spine; thoracic vertebral; upper
    thoracic spine; thoracic disc; thoracic endplate; midthoracic; midthoracic vertebral body; mid thoracic vertebra;
    thoracic level; thoracic region
Thoracolumbar Spine | thoracolumbar; thoracolumbar spine; thoracolumbar junction; dorsolumbar spine; thoracic and
    lumbar spine; thoracic and lumbar
Thoracic Wall | chest wall; thoracic wall
Soft Tissue | soft tissue
Thorax | thorax; thoracic; thoracic cage; chest; rib cage; intrathoracic; bony thorax
Thyroid Gland | thyroid; thyroid gland; goiter
Trachea | trachea; tracheal; tracheal air column; tracheobronchial; airway
Trachea, Carina | carina; carinal; subcarinal; infracarinal
Vena Cava, Superior | superior vena cava; svc; cavoatrial junction; vena cava; caval

[technique]
Radiography | radiograph; radiography; x ray; chest x ray; chest radiograph; film; plain film; cxr
Tomography, X-Ray Computed | ct; computed tomography; ct scan; cat scan; hrct
Ultrasonography | ultrasound; sonography; sonogram; echocardiogram; echocardiography
Magnetic Resonance Imaging | mri; magnetic resonance imaging
Fluoroscopy | fluoroscopy; fluoroscopic
"""
