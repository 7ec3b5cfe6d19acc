"""Protobuf in, protobuf out: what the server tells clients and containers about functions."""

from collections.abc import Mapping

from google.protobuf.descriptor import FieldDescriptor
from modal_proto import api_pb2

from .model import App, Function

_PLAIN_OPTIONS = (
    "max_concurrent_inputs",
    "target_concurrent_inputs",
    "batch_max_size",
    "batch_linger_ms",
    "timeout_secs",
    "task_idle_timeout_secs",
)


def chosen(request: api_pb2.FunctionCreateRequest) -> api_pb2.Function:
    """The definition that the scheduler would try first: of a list of GPUs, the first."""
    result = api_pb2.Function()
    ranked = request.function_data.ranked_functions
    result.CopyFrom(min(ranked, key=lambda r: r.rank).function if ranked else request.function)
    return result


def gpu_choices(request: api_pb2.FunctionCreateRequest) -> list[str]:
    """The GPUs asked for, first choice first."""
    ranked = sorted(request.function_data.ranked_functions, key=lambda r: r.rank)
    functions = [r.function for r in ranked] or [request.function]
    found = [f.resources.gpu_config for f in functions]
    return [
        f"{gpu.gpu_type}:{gpu.count}" if gpu.count > 1 else gpu.gpu_type
        for gpu in found
        if gpu.gpu_type
    ]


def with_options(
    base: api_pb2.Function, options: api_pb2.FunctionOptions | None
) -> api_pb2.Function:
    """A copy of `base` as `Cls.with_options(...)` and its like change it."""
    result = api_pb2.Function()
    result.CopyFrom(base)
    if options is None:
        return result
    for name in _PLAIN_OPTIONS:
        if options.HasField(name):  # type: ignore[arg-type]
            setattr(result, name, getattr(options, name))
    if options.HasField("concurrency_limit"):
        result.autoscaler_settings.max_containers = options.concurrency_limit
    if options.HasField("task_idle_timeout_secs"):
        result.autoscaler_settings.scaledown_window = options.task_idle_timeout_secs
    if options.HasField("resources"):
        result.resources.MergeFrom(options.resources)
    if options.HasField("retry_policy"):
        result.retry_policy.CopyFrom(options.retry_policy)
    if options.replace_secret_ids:
        result.ClearField("secret_ids")
        result.secret_ids.extend(options.secret_ids)
    # These too replace what the function had: so says the client's documentation.
    if options.replace_volume_mounts:
        result.ClearField("volume_mounts")
        result.volume_mounts.extend(options.volume_mounts)
    if options.replace_cloud_bucket_mounts:
        result.ClearField("cloud_bucket_mounts")
        result.cloud_bucket_mounts.extend(options.cloud_bucket_mounts)
    return result


def handle_metadata(
    function: Function, web_urls: Mapping[str, str]
) -> api_pb2.FunctionHandleMetadata:
    source = function.definition if function.created else function.precreate
    assert source is not None
    result = api_pb2.FunctionHandleMetadata(
        function_name=source.function_name,
        function_type=source.function_type,
        web_url=web_urls.get("", ""),
        definition_id=function.definition_id,
        function_schema=source.function_schema,
        supported_input_formats=source.supported_input_formats,
        supported_output_formats=source.supported_output_formats,
        app_id=function.app_id,
        base_function_id=function.base_id,
    )
    if function.created:
        result.class_parameter_info.CopyFrom(function.definition.class_parameter_info)
        result.is_method = function.definition.is_method
    for name, method in source.method_definitions.items():
        result.method_handle_metadata[name].CopyFrom(
            api_pb2.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                is_method=True,
                use_method_name=name,
                definition_id=function.definition_id,
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
                web_url=web_urls.get(name, ""),
                app_id=function.app_id,
            )
        )
    return result


def function_data(definition: api_pb2.Function) -> api_pb2.FunctionData:
    """The newer shape of a definition. The client wants at least one ranked function in it."""
    result = api_pb2.FunctionData()
    fields: Mapping[str, FieldDescriptor] = definition.DESCRIPTOR.fields_by_name
    for field in result.DESCRIPTOR.fields:
        if field.name in fields and field.name != "ranked_functions":
            _copy_field(field, definition, result)
    result.ranked_functions.add(rank=0, function=definition)
    return result


def _copy_field(
    field: FieldDescriptor, source: api_pb2.Function, target: api_pb2.FunctionData
) -> None:
    value = getattr(source, field.name)
    if field.is_repeated:
        getattr(target, field.name).MergeFrom(value)
    elif field.message_type is None:
        setattr(target, field.name, value)
    elif source.HasField(field.name):
        getattr(target, field.name).CopyFrom(value)


def layout(
    app: App,
    functions: Mapping[str, Function],
    metadata: Mapping[str, api_pb2.FunctionHandleMetadata],
    volumes: Mapping[str, api_pb2.VolumeMetadata],
) -> api_pb2.AppLayout:
    """What a container learns of its app. It looks up every object that its function depends on."""
    result = api_pb2.AppLayout(function_ids=app.function_ids, class_ids=app.class_ids)
    for function_id in app.function_ids.values():
        result.objects.add(object_id=function_id, function_handle_metadata=metadata[function_id])
    for class_id in app.class_ids.values():
        result.objects.add(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
    needed = {
        dependency.object_id
        for function_id in app.function_ids.values()
        for dependency in functions[function_id].definition.object_dependencies
    }
    for object_id in sorted(needed):
        entry = result.objects.add(object_id=object_id)
        if object_id in volumes:
            entry.volume_metadata.CopyFrom(volumes[object_id])
    return result
