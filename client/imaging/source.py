"""Where are a hospital's images, and who is the patient? The operator's declaration, checked.

A `Source` is a small TOML file that `consilium-site data connect` writes and the agent reads. The patient is
the unit of everything that follows (split, privacy, metrics), so a source that does not say who the patient
is gets refused unless the operator declares that one image is one patient.
"""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from privacy.errors import ConsiliumError


class Columns(BaseModel):
    """Names of the label table's columns.

    Attributes:
        image: the file (relative to the folder), or the UID that `Source.match` names. Unused for npz, whose
            rows follow the images' order.
        label: the class, by name or by number; several labels have `;` between them.
        labels: columns of yes and no, one for each class and named like it, in place of `label`.
        mask: the file with the image's mask (PNG or NIfTI), relative to the folder.
        patient: who the patient is; None takes the DICOM PatientID.
        split: a column with train, validation or test; None lets the study split by patient.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = "file"
    label: str = "label"
    labels: tuple[str, ...] = ()
    mask: str | None = None
    patient: str | None = None
    split: str | None = None


class Source(BaseModel):
    """One hospital's images for one study.

    Attributes:
        kind: "dicom", "nifti" or "images" (PNG, JPEG): a folder, searched recursively; or "npz".
        path: the folder, or the npz file.
        labels: the label table (CSV). A folder needs one unless its labels come from `label_tag`, or its masks from
            `masks` or from DICOM SEG, and the patient from the DICOM header or from `one_image_per_patient`.
        label_tag: the DICOM attribute that holds the label, by its keyword, such as "BodyPartExamined".
        masks: a folder below `path` with a mask for each image, under the image's name.
        columns: the table's columns.
        match: what the table's `image` column holds: a file name, a SOPInstanceUID or a SeriesInstanceUID.
        classes: the hospital's own words for the study's classes, e.g. {"pos": "opacity"}; for masks, words or
            numbers, e.g. {"255": "nucleus"}.
        modalities: DICOM modalities that are taken, e.g. ("DX", "CR"); empty takes every image modality.
        one_image_per_patient: the operator's declaration that no patient has two images; model cards repeat it.
        placeholder_headers: the declaration that PatientID, study and series UID were overwritten by an
            anonymiser and say nothing, so that the table alone says who the patient is.
        own_split: honour the split that the file brings (train_images, test_images, or the split column).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dicom", "nifti", "images", "npz"]
    path: Path
    labels: Path | None = None
    label_tag: str = ""
    masks: Path | None = None
    columns: Columns = Columns()
    match: Literal["file", "instance", "series"] = "file"
    classes: dict[str, str] = Field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    one_image_per_patient: StrictBool = False
    placeholder_headers: StrictBool = False
    own_split: StrictBool = True

    @model_validator(mode="after")
    def _one_answer_to_who_is_the_patient(self) -> Source:
        if self.one_image_per_patient and self.columns.patient:
            raise ValueError("--one-image-per-patient and --patient-column exclude each other: keep one")
        if self.label_tag and self.kind != "dicom":
            raise ValueError("--label-tag is for DICOM only")
        if self.label_tag and (wrong := _no_attribute(self.label_tag)):
            raise ValueError(wrong)
        if self.masks is not None and self.kind in {"dicom", "npz"}:
            raise ValueError("--masks is a folder beside NIfTI, PNG or JPEG images: elsewhere use --mask-column")
        if self.columns.labels and self.label_tag:
            raise ValueError("--labels-column and --label-tag exclude each other: keep one")
        if self.labels is None and self.kind in {"nifti", "images"}:
            if self.masks is None:
                raise ValueError("a folder of images needs a label table (--labels) or a folder of masks (--masks)")
            if not self.one_image_per_patient:
                raise ValueError(
                    "nothing names the patient: give a label table (--labels) with --patient-column "
                    "or declare --one-image-per-patient"
                )
        if self.kind in {"nifti", "images"} and not (self.columns.patient or self.one_image_per_patient):
            raise ValueError("nothing names the patient: give --patient-column or declare --one-image-per-patient")
        if self.columns.patient and self.labels is None and self.kind != "npz":
            raise ValueError("--patient-column names a column of a table that is missing: give --labels")
        if self.placeholder_headers and not (self.columns.patient or self.one_image_per_patient):
            raise ValueError(
                "--placeholder-headers leaves nobody to name the patient: "
                "give --patient-column or declare --one-image-per-patient"
            )
        if self.columns.split and self.kind == "dicom":
            raise ValueError("--split-column is not for DICOM: a DICOM folder is split by patient")
        if self.match != "file" and self.kind != "dicom":
            raise ValueError("--match is for DICOM only: other images have no UIDs")
        return self

    @classmethod
    def from_fields(cls, fields: dict[str, Any], subject: str = "source") -> Source:
        """The declaration from plain values; ConsiliumError names every field that is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            wrong = "; ".join(_sentence(dict(item)) for item in error.errors())
            raise ConsiliumError("The source declaration is not valid", subject, f"Put right: {wrong}.") from None

    @classmethod
    def from_file(cls, file: Path) -> Source:
        """Reads a TOML declaration; relative paths in it are relative to the file itself."""
        try:
            fields = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConsiliumError(
                "The source declaration cannot be read",
                str(file),
                f"Write it again with `consilium-site data connect` ({type(error).__name__}).",
            ) from None
        return cls.from_fields(fields, str(file)).anchored(file.parent)

    def anchored(self, folder: Path) -> Source:
        """The same source with absolute paths."""
        base = folder.resolve()
        labels = base / self.labels if self.labels else None
        masks = base / self.masks if self.masks else None
        return self.model_copy(update={"path": base / self.path, "labels": labels, "masks": masks})

    def to_toml(self) -> str:
        """The declaration as TOML, defaults left out; `from_file` reads it back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_defaults=True))

    def check(self) -> None:
        """Is everything there that the declaration names? Raises ConsiliumError with the remedy."""
        if self.kind != "npz" and not self.path.is_dir():
            raise ConsiliumError("There is no such image folder", str(self.path), "Name an existing folder of images.")
        if self.kind == "npz" and not self.path.is_file():
            raise ConsiliumError("There is no such image file", str(self.path), "Name an existing npz file.")
        if self.labels is not None and not self.labels.is_file():
            raise ConsiliumError("There is no such label table", str(self.labels), "Name an existing CSV file.")
        if self.masks is not None and not (
            self.masks.is_dir() and self.masks.resolve().is_relative_to(self.path.resolve())
        ):
            raise ConsiliumError(
                "There is no such folder of masks below the images", str(self.masks), "Name a folder inside the source."
            )

    @property
    def patient_rule(self) -> str:
        """One sentence for reports and model cards: what a patient is in this source."""
        if self.one_image_per_patient:
            return "One image is one patient, as the operator declared."
        if self.columns.patient:
            return "The patient is the one that the label table names."
        return "The patient is the one that the image file names."


def _no_attribute(word: str) -> str:
    """What is wrong with the keyword of a DICOM attribute (PS3.6, 6), and what may have been meant; "" if nothing."""
    from pydicom.datadict import keyword_dict, keyword_for_tag, tag_for_keyword

    if tag_for_keyword(word) is not None:
        return ""
    digits = re.fullmatch(r"\(?([0-9A-Fa-f]{4}),? ?([0-9A-Fa-f]{4})\)?", word)
    meant = [keyword_for_tag(int(digits[1] + digits[2], 16))] if digits else []
    meant = [near for near in meant if near] or get_close_matches(word, keyword_dict, 3)
    advice = f"near it are {', '.join(meant)}" if meant else "give its keyword, such as BodyPartExamined"
    return f"there is no DICOM attribute “{word}” for --label-tag; {advice}"


def _sentence(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    said = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
