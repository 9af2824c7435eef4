"""Sources of images and reports, one file a dataset family. Each import line makes one known in SOURCES."""

from medim_ray.data.sources import chexpert as chexpert
from medim_ray.data.sources import columnar as columnar
from medim_ray.data.sources import covid as covid
from medim_ray.data.sources import csv as csv
from medim_ray.data.sources import dicom as dicom
from medim_ray.data.sources import folder as folder
from medim_ray.data.sources import mimic_cxr as mimic_cxr
from medim_ray.data.sources import nih as nih
from medim_ray.data.sources import openi as openi
from medim_ray.data.sources import padchest as padchest
from medim_ray.data.sources import phantom as phantom
from medim_ray.data.sources import pneumothorax as pneumothorax
from medim_ray.data.sources import rsna as rsna
from medim_ray.data.sources import vindr_cxr as vindr_cxr
from medim_ray.data.sources import webdataset as webdataset
from medim_ray.data.sources.base import SOURCES as SOURCES
