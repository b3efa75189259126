//! The role that each method needs. The one table; a test compares it with the descriptors of all services.

use super::Role::{self, Admin, Read, Run};

/// By full method name, sorted by service. What reads or writes files of the host that the caller names, or removes what all
/// others build on, is for admins.
pub const METHODS: &[(&str, Role)] = &[
    ("coldspark.v1.AgentService/Call", Run),
    ("coldspark.v1.AgentService/Exec", Run),
    ("coldspark.v1.AgentService/GetFile", Run),
    ("coldspark.v1.AgentService/PutFile", Run),
    ("coldspark.v1.EventService/Watch", Read),
    ("coldspark.v1.FunctionService/DeleteFunction", Admin),
    ("coldspark.v1.FunctionService/Deploy", Admin),
    ("coldspark.v1.FunctionService/GetFunction", Read),
    ("coldspark.v1.FunctionService/Invoke", Run),
    ("coldspark.v1.FunctionService/InvokeStream", Run),
    ("coldspark.v1.FunctionService/ListFunctions", Read),
    ("coldspark.v1.ImageService/DeleteImage", Admin),
    ("coldspark.v1.ImageService/GetImage", Read),
    ("coldspark.v1.ImageService/ImportImage", Admin),
    ("coldspark.v1.ImageService/ListImages", Read),
    ("coldspark.v1.MetricsService/GetMetrics", Read),
    ("coldspark.v1.PoolService/CreatePool", Admin),
    ("coldspark.v1.PoolService/DeletePool", Admin),
    ("coldspark.v1.PoolService/GetPool", Read),
    ("coldspark.v1.PoolService/ListPools", Read),
    ("coldspark.v1.PoolService/TakeVm", Run),
    ("coldspark.v1.PoolService/UpdatePool", Admin),
    ("coldspark.v1.SnapshotService/CreateSnapshot", Run),
    ("coldspark.v1.SnapshotService/DeleteSnapshot", Run),
    ("coldspark.v1.SnapshotService/GetSnapshot", Read),
    ("coldspark.v1.SnapshotService/ListSnapshots", Read),
    ("coldspark.v1.SnapshotService/VerifySnapshot", Read),
    ("coldspark.v1.VmService/CloneVm", Run),
    // Typing is using the VM, and both directions are one method.
    ("coldspark.v1.VmService/Console", Run),
    ("coldspark.v1.VmService/CreateVm", Run),
    ("coldspark.v1.VmService/DeleteVm", Run),
    ("coldspark.v1.VmService/GetVm", Read),
    ("coldspark.v1.VmService/GetVmStats", Read),
    // Stops the vCPUs for a moment, and shows what is in their registers.
    ("coldspark.v1.VmService/InspectVm", Run),
    ("coldspark.v1.VmService/ListVms", Read),
    ("coldspark.v1.VmService/PauseVm", Run),
    ("coldspark.v1.VmService/ResumeVm", Run),
    ("coldspark.v1.VmService/StopVm", Run),
    ("grpc.health.v1.Health/Check", Read),
    ("grpc.health.v1.Health/Watch", Read),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Read),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Read),
];

/// What a request's path (`/package.Service/Method`) needs; `None`: there is no such method.
pub fn role_of(path: &str) -> Option<Role> {
    let name = path.strip_prefix('/')?;
    let at = METHODS.binary_search_by(|(method, _)| (*method).cmp(name)).ok()?;
    Some(METHODS[at].1)
}

/// The method of a request's path, by its name in the table: of what does not exist there are too many names.
pub fn name_of(path: &str) -> &'static str {
    let name = path.strip_prefix('/').unwrap_or_default();
    METHODS.binary_search_by(|(method, _)| (*method).cmp(name)).map_or("unknown", |at| METHODS[at].0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::api::proto::DESCRIPTORS;

    #[test]
    fn every_method_of_every_service_has_its_line_and_no_line_is_for_nothing() {
        let mut there = BTreeSet::new();
        let sets = [
            DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        for set in sets {
            for file in FileDescriptorSet::decode(set).expect("a descriptor set").file {
                for service in &file.service {
                    for method in &service.method {
                        there.insert(format!("{}.{}/{}", file.package(), service.name(), method.name()));
                    }
                }
            }
        }
        let listed: BTreeSet<String> = METHODS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(listed, there, "left: the table, right: the services");
        assert!(METHODS.is_sorted_by_key(|(name, _)| name), "looked up by halves");
        assert_eq!(METHODS.len(), listed.len());
    }

    #[test]
    fn paths_are_looked_up_whole() {
        assert_eq!(role_of("/coldspark.v1.VmService/CreateVm"), Some(Run));
        assert_eq!(role_of("/coldspark.v1.ImageService/ImportImage"), Some(Admin));
        for path in ["", "/", "coldspark.v1.VmService/CreateVm", "//coldspark.v1.VmService/CreateVm"] {
            assert_eq!(role_of(path), None, "{path}");
        }
        assert_eq!(role_of("/coldspark.v1.VmService/createvm"), None);
        assert_eq!(role_of("/coldspark.v1.VmService/CreateVm/"), None);
    }
}
