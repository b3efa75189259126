//! ImageService.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Request, Response, Status, Streaming};

use super::convert;
use super::pages::Page;
use super::proto;
use super::proto::image_service_server::ImageService;
use super::status::{invalid, status};
use crate::fleet::Fleet;
use crate::fleet::images::{Described, ImageFile, ImportDisk, ImportImage, Settings};
use proto::file_chunk::File;
use proto::import_image_request::Message;

/// Most bytes of one chunk.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// An import of which nothing comes for so long is given up: there are only so many at a time.
const IDLE_MAX: Duration = Duration::from_secs(300);

/// The service.
pub struct Images {
    fleet: Arc<Fleet>,
}

impl Images {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet }
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn import_image(
        &self,
        request: Request<Streaming<proto::ImportImageRequest>>,
    ) -> Result<Response<proto::Image>, Status> {
        let mut messages = request.into_inner();
        let first = within(IDLE_MAX, messages.message()).await?.and_then(|first| first.message);
        let Some(Message::Spec(spec)) = first else {
            return Err(invalid("the first message of ImportImage must be `spec`"));
        };
        let mut import = self.fleet.import_image(spec_in(spec)?).await?;
        while let Some(message) = within(IDLE_MAX, messages.message()).await? {
            let Some(Message::Chunk(chunk)) = message.message else {
                return Err(invalid("messages after the first of ImportImage must be `chunk`"));
            };
            let file = match chunk.file {
                Some(File::Kernel(true)) => ImageFile::Kernel,
                Some(File::Module(true)) => ImageFile::Module,
                Some(File::Disk(n)) => ImageFile::Disk(n),
                _ => return Err(invalid("a chunk must say which file it is of")),
            };
            if chunk.zeros > 0 {
                if !chunk.data.is_empty() {
                    return Err(invalid("a chunk has either `data` or `zeros`"));
                }
                import.write_zeros(file, chunk.zeros).await?;
                continue;
            }
            if !(1..=CHUNK_BYTES_MAX).contains(&chunk.data.len()) {
                return Err(invalid(format!(
                    "a chunk of {} bytes; send 1 to {CHUNK_BYTES_MAX}",
                    chunk.data.len()
                )));
            }
            import.write(file, chunk.data).await?;
        }
        Ok(Response::new(image(import.finish().await?)))
    }

    async fn list_images(
        &self,
        request: Request<proto::ListImagesRequest>,
    ) -> Result<Response<proto::ListImagesResponse>, Status> {
        let request = request.into_inner();
        let page = Page::asked(request.page_size, &request.page_token)?;
        let (images, next_page_token) = page.of(self.fleet.list_images(), |one| one.name.clone(), image);
        Ok(Response::new(proto::ListImagesResponse { images, next_page_token }))
    }

    async fn get_image(
        &self,
        request: Request<proto::GetImageRequest>,
    ) -> Result<Response<proto::Image>, Status> {
        Ok(Response::new(image(self.fleet.image(&request.into_inner().name)?)))
    }

    async fn delete_image(
        &self,
        request: Request<proto::DeleteImageRequest>,
    ) -> Result<Response<proto::DeleteImageResponse>, Status> {
        self.fleet.delete_image(&request.into_inner().name).await?;
        Ok(Response::new(proto::DeleteImageResponse {}))
    }
}

/// What comes next, if it comes in time.
async fn within<T>(idle: Duration, next: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(idle, next).await.unwrap_or_else(|_| {
        Err(status(
            Code::DeadlineExceeded,
            "IMPORT_STALLED",
            format!(
                "nothing of the image came for {} s: the import is given up; send it again",
                idle.as_secs()
            ),
        ))
    })
}

pub fn spec_in(spec: proto::ImageSpec) -> Result<ImportImage, Status> {
    let boot = spec.boot.unwrap_or_default();
    let usual = Settings::default();
    Ok(ImportImage {
        name: spec.name,
        settings: Settings {
            protocol: convert::protocol_in(boot.protocol)?,
            hardware: convert::hardware_in(boot.hardware)?,
            agent_port: convert::agent_port_in(boot.agent_port)?,
            command_line: boot.command_line,
            vcpus: convert::vcpus_in(boot.vcpus)?.unwrap_or(usual.vcpus),
            memory_bytes: convert::nonzero(boot.memory_bytes).unwrap_or(usual.memory_bytes),
            ready: convert::ready_in(boot.ready)?.unwrap_or(usual.ready),
        },
        module: convert::module_in(spec.module)?,
        disks: spec
            .disks
            .into_iter()
            .map(|disk| ImportDisk { read_only: disk.read_only, bytes: disk.bytes, name: disk.name })
            .collect(),
        embedded: spec.embedded,
        find_kernel: spec.find_kernel,
        kernel_bytes: spec.kernel_bytes,
        module_bytes: spec.module_bytes,
    })
}

fn image(image: Described) -> proto::Image {
    proto::Image {
        name: image.name,
        boot: Some(proto::BootSettings {
            protocol: convert::protocol_out(image.settings.protocol).into(),
            command_line: image.settings.command_line,
            vcpus: image.settings.vcpus.into(),
            memory_bytes: image.settings.memory_bytes,
            ready: Some(convert::ready_out(&image.settings.ready)),
            hardware: convert::hardware_out(image.settings.hardware).into(),
            agent_port: convert::agent_port_out(image.settings.agent_port).into(),
        }),
        module: convert::module_out(image.module).into(),
        disks: image
            .disks
            .into_iter()
            .map(|(read_only, bytes)| proto::ImageDisk { read_only, bytes })
            .collect(),
        kernel_bytes: image.kernel_bytes,
        module_bytes: image.module_bytes,
        embedded: image.embedded,
        created_unix_ms: image.created_unix_ms,
        found: image.found,
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[tokio::test]
    async fn an_import_of_which_nothing_comes_is_given_up() {
        assert_eq!(within(IDLE_MAX, async { Ok(7) }).await.unwrap(), 7);
        let stalled = within(Duration::from_millis(20), std::future::pending::<Result<(), Status>>());
        let error = stalled.await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded);
        let reason = error.get_error_details().error_info().map(|info| info.reason.clone());
        assert_eq!(reason.as_deref(), Some("IMPORT_STALLED"));
    }
}
