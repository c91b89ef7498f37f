from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HelloRequest(_message.Message):
    __slots__ = ("protocol", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class SubmitChunk(_message.Message):
    __slots__ = ("document", "data")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    data: bytes
    def __init__(self, document: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("study", "session", "slot", "request", "offset", "length")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    study: str
    session: int
    slot: int
    request: str
    offset: int
    length: int
    def __init__(self, study: _Optional[str] = ..., session: _Optional[int] = ..., slot: _Optional[int] = ..., request: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LocalHello(_message.Message):
    __slots__ = ("protocol", "version", "site")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    site: str
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., site: _Optional[str] = ...) -> None: ...

class StudyLine(_message.Message):
    __slots__ = ("study", "name", "title", "state", "data", "slot", "slots", "last", "at")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    study: str
    name: str
    title: str
    state: str
    data: str
    slot: int
    slots: int
    last: str
    at: str
    def __init__(self, study: _Optional[str] = ..., name: _Optional[str] = ..., title: _Optional[str] = ..., state: _Optional[str] = ..., data: _Optional[str] = ..., slot: _Optional[int] = ..., slots: _Optional[int] = ..., last: _Optional[str] = ..., at: _Optional[str] = ...) -> None: ...

class DataLine(_message.Message):
    __slots__ = ("name", "source", "summary")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    summary: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., summary: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("site", "version", "identity", "device", "network", "disk_free_bytes", "journal_entries", "journal_head", "working", "roster_version", "studies", "data")
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_HEAD_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    site: str
    version: str
    identity: str
    device: str
    network: bool
    disk_free_bytes: int
    journal_entries: int
    journal_head: str
    working: str
    roster_version: int
    studies: _containers.RepeatedCompositeFieldContainer[StudyLine]
    data: _containers.RepeatedCompositeFieldContainer[DataLine]
    def __init__(self, site: _Optional[str] = ..., version: _Optional[str] = ..., identity: _Optional[str] = ..., device: _Optional[str] = ..., network: _Optional[bool] = ..., disk_free_bytes: _Optional[int] = ..., journal_entries: _Optional[int] = ..., journal_head: _Optional[str] = ..., working: _Optional[str] = ..., roster_version: _Optional[int] = ..., studies: _Optional[_Iterable[_Union[StudyLine, _Mapping]]] = ..., data: _Optional[_Iterable[_Union[DataLine, _Mapping]]] = ...) -> None: ...

class DocumentMessage(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    def __init__(self, document: _Optional[bytes] = ...) -> None: ...

class Imported(_message.Message):
    __slots__ = ("kind", "subject")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    subject: str
    def __init__(self, kind: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...

class StudyName(_message.Message):
    __slots__ = ("study",)
    STUDY_FIELD_NUMBER: _ClassVar[int]
    study: str
    def __init__(self, study: _Optional[str] = ...) -> None: ...

class StudyDetail(_message.Message):
    __slots__ = ("document", "line")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    line: StudyLine
    def __init__(self, document: _Optional[bytes] = ..., line: _Optional[_Union[StudyLine, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("study", "decision", "data")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    study: str
    decision: str
    data: str
    def __init__(self, study: _Optional[str] = ..., decision: _Optional[str] = ..., data: _Optional[str] = ...) -> None: ...

class Decided(_message.Message):
    __slots__ = ("approval", "line", "cautions")
    APPROVAL_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    CAUTIONS_FIELD_NUMBER: _ClassVar[int]
    approval: bytes
    line: StudyLine
    cautions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, approval: _Optional[bytes] = ..., line: _Optional[_Union[StudyLine, _Mapping]] = ..., cautions: _Optional[_Iterable[str]] = ...) -> None: ...

class ConnectData(_message.Message):
    __slots__ = ("name", "source")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class DataName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CheckData(_message.Message):
    __slots__ = ("name", "study")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    name: str
    study: str
    def __init__(self, name: _Optional[str] = ..., study: _Optional[str] = ...) -> None: ...

class CheckEvent(_message.Message):
    __slots__ = ("done", "total", "summary")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    summary: str
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., summary: _Optional[str] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("name", "ok", "detail", "remedy")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    detail: str
    remedy: str
    def __init__(self, name: _Optional[str] = ..., ok: _Optional[bool] = ..., detail: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class Findings(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class ModelLine(_message.Message):
    __slots__ = ("study", "title", "folder", "result")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    study: str
    title: str
    folder: str
    result: str
    def __init__(self, study: _Optional[str] = ..., title: _Optional[str] = ..., folder: _Optional[str] = ..., result: _Optional[str] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelLine]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelLine, _Mapping]]] = ...) -> None: ...

class OfficerKey(_message.Message):
    __slots__ = ("key", "replace")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    key: str
    replace: bool
    def __init__(self, key: _Optional[str] = ..., replace: _Optional[bool] = ...) -> None: ...

class BudgetReply(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...
